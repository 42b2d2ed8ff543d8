"""What a bank looks at around each optimizer's step, to warn of a run that goes wrong."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch.optim import Optimizer

from autogate.gating.finite_weights import FiniteWeights
from autogate.gating.first_steps import FirstSteps
from autogate.gating.kernels import GatedKernels
from autogate.gating.processes import Processes
from autogate.gating.state import BankState
from autogate.gating.stepping import Stepping


class Watch:
    """Watches a run, step by step.

    Args:
        kernels: the gated kernels.
        stepping: takes the gates' steps.
        added: weights of layers that were not in the user's model.
        untrained: the model looked untrained when it was prepared.
    """

    def __init__(self, kernels: GatedKernels, stepping: Stepping, added: Collection[str], untrained: bool):
        self._kernels = kernels
        self._stepping = stepping
        self._added = added
        self.first_steps = FirstSteps(untrained)
        self._finite_weights = FiniteWeights()
        self.processes = Processes()

    def __setstate__(self, state: dict[str, Any]) -> None:
        untrained = state["first_steps"].untrained
        self.__init__(state["_kernels"], state["_stepping"], state["_added"], untrained)  # type: ignore[misc]

    def loaded(self) -> None:
        """Called when a checkpoint was loaded."""
        self.first_steps.untrained = False
        self._finite_weights = FiniteWeights()
        self.processes.loaded()

    def before(self, state: BankState, optimizer: Optimizer | None) -> None:
        """Called before each step.

        Args:
            state: the bank's buffers.
            optimizer: about to step, if it is known.
        """
        if self.first_steps.over:
            return
        self.first_steps.starts(self._stepping.learner.schedule.steps, self._stepping.counters(state).steps)
        if optimizer is not None:
            named = self._kernels.named(state.alpha.device)
            self.first_steps.steps(optimizer, named, self._kernels.learning(self._added))

    def after(self, state: BankState, finite: bool | None) -> None:
        """Called after each step.

        Args:
            state: the bank's buffers.
            finite: whether the step's reading of kernels and gradients was finite; None if nothing was read.

        Raises:
            AutogateError: see `Processes.stepped`.
        """
        if self.first_steps.waits_for_gradients:
            self.first_steps.stepped(self._kernels.find(state.alpha.device).kernels)
        self._finite_weights.stepped(finite, self._kernels.model())
        self.processes.stepped(
            state, self._stepping.counters(state).steps, lambda: self._stepping.sums(state).squares()
        )
