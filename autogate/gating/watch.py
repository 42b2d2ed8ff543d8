"""What a bank looks at around each optimizer's step, to warn of a run that goes wrong."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch.optim import Optimizer

from autogate.gating.finite_weights import FiniteWeights
from autogate.gating.first_steps import FirstSteps
from autogate.gating.kernels import GatedKernels


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

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.first_steps, self._finite_weights = FirstSteps(self.first_steps.untrained), FiniteWeights()

    def loaded(self) -> None:
        """Called when a checkpoint was loaded."""
        self.first_steps.untrained = False
        self._finite_weights = FiniteWeights()

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

    def after(self, device: torch.device, finite: bool | None) -> None:
        """Called after each step.

        Args:
            device: where values per class are.
            finite: whether the step's reading of kernels and gradients was finite; None if nothing was read.
        """
        self.first_steps.stepped(self._kernels.all(device))
        self._finite_weights.stepped(finite, self._kernels.model())
