"""What a bank looks at around each optimizer's step, to warn of a run that goes wrong."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from autogate.gating.finite_weights import FiniteWeights
from autogate.gating.first_steps import FirstSteps
from autogate.gating.kernels import GatedKernels
from autogate.gating.processes import Processes
from autogate.gating.state import BankState


class Watch:
    """Watches a run, step by step.

    Args:
        kernels: the gated kernels.
        added: weights of layers that were not in the user's model.
        untrained: the model looked untrained when it was prepared.
    """

    def __init__(self, kernels: GatedKernels, added: Collection[str], untrained: bool):
        self._kernels = kernels
        self._added = added
        self.first_steps = FirstSteps(untrained)
        self._finite_weights = FiniteWeights()
        self.processes = Processes()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["_kernels"], state["_added"], state["first_steps"].untrained)  # type: ignore[misc]

    def loaded(self) -> None:
        """Called when a checkpoint was loaded."""
        self.first_steps.untrained = False
        self._finite_weights = FiniteWeights()
        self.processes.loaded()

    def before(self, device: torch.device, steps: int, taken: int, optimizer: Optimizer | None) -> None:
        """Called before each step, at least until `first_steps.over`.

        Args:
            device: where values per class are.
            steps: of the whole run.
            taken: steps that were taken before.
            optimizer: about to step, if it is known.
        """
        self.first_steps.starts(steps, taken)
        if optimizer is not None:
            self.first_steps.steps(optimizer, self._kernels.named(device), self._kernels.learning(self._added))

    def after(self, state: BankState, steps: int, finite: bool | None, squares: Callable[[], Tensor]) -> None:
        """Called after each step.

        Args:
            state: the bank's buffers.
            steps: steps that the gates have taken.
            finite: whether the step's reading of kernels and gradients was finite; None if nothing was read.
            squares: gives the sum over each class's columns of the kernels' squares, shape (classes,).

        Raises:
            AutogateError: see `Processes.stepped`.
        """
        self.first_steps.stepped(self._kernels.all(state.alpha.device))
        self._finite_weights.stepped(finite, self._kernels.model())
        self.processes.stepped(state, steps, squares)
