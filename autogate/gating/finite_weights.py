"""Weights that are not finite are told of when they become so, not by `finalize` after the run."""

from __future__ import annotations

import torch
from torch import nn

from autogate.gating.first_steps import some, warn
from autogate.gating.sharding import local

UNREAD_STEPS = 100
"""Once gates stand still, no reading tells of the weights. They are looked at every so many steps: on average, a
hundredth of a pass over them a step."""


class FiniteWeights:
    """Watches a model's weights, and warns once if any is not finite.

    A reading that is not finite is no proof: the gradients may be to blame, and a loop may leave such a step out, as
    GradScaler does. So the weights themselves are looked at, after such a reading alone.
    """

    def __init__(self) -> None:
        self._told = False
        self._unread = 0

    def stepped(self, finite: bool | None, model: nn.Module | None) -> None:
        """Called after each step.

        Args:
            finite: whether the step's reading of kernels and gradients was finite; None if nothing was read.
            model: whose weights these are, if it is still there.
        """
        if self._told or model is None:
            return
        if finite is None:
            self._unread = (self._unread + 1) % UNREAD_STEPS
            finite = self._unread != 0
        if not finite and (names := _not_finite(model)):
            self._told = True
            warn(
                f"{some(names)}: the weights are not finite any more. No step brings them back, and autogate.finalize "
                "will refuse the model. Go back to a checkpoint from before, and train with a smaller learning rate or "
                "with clipping.",
                after=True,
            )


def _not_finite(model: nn.Module) -> list[str]:
    """Names of the parameters with a value in this process that is not finite."""
    weights = {
        name: local(weight.detach())
        for name, weight in model.named_parameters()
        if weight.is_floating_point() and not weight.is_meta
    }
    if not weights:
        return []
    device = next(iter(weights.values())).device
    finite = torch.stack([torch.isfinite(weight).all().to(device) for weight in weights.values()]).tolist()
    return [name for name, good in zip(weights, finite, strict=True) if not good]
