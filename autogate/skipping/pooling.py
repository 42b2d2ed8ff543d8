"""Max pooling that skips channels which are zero: they stay zero."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from autogate.skipping.break_even import BreakEven
from autogate.skipping.forwards import spread


class PoolingForward:
    """The forward of a max pooling over images, which shadows the module's own on the instance.

    On a processor, the pooling of a network's stem takes as long as several of its convolutions.

    Args:
        pool: the module.

    Attributes:
        break_even: how many channels may be other than zero for the rest to be skipped; None if nothing is.
    """

    rows, columns = True, False

    def __init__(self, pool: nn.MaxPool2d):
        self.pool = pool
        self.break_even: BreakEven | None = None

    def __call__(self, input: Tensor) -> Any:
        if (
            torch.compiler.is_compiling() or torch.jit.is_tracing() or type(input) is not Tensor or input.ndim != 4
            or self.break_even is None or torch.is_grad_enabled() or self.pool.return_indices or not input.numel()
        ):  # fmt: skip
            return self._whole(input)
        on = _other_than_zero(input)
        if len(on) == input.shape[1] or len(on) > self.break_even.work * input.shape[1]:
            return self._whole(input)
        return self._pooled(input, on if len(on) else on.new_zeros(1))

    def trial(self, input: Tensor, on: float, read: float) -> Tensor:
        """What pooling takes if this share of the channels isn't zero: for timing."""
        if on == 1:
            return self._whole(input)
        _other_than_zero(input)
        return self._pooled(input, torch.arange(max(1, round(on * input.shape[1])), device=input.device))

    def _whole(self, input: Tensor) -> Any:
        return type(self.pool).forward(self.pool, input)

    def _pooled(self, input: Tensor, on: Tensor) -> Tensor:
        return spread(self._whole(input.index_select(1, on)), on, input.shape[1])


def _other_than_zero(x: Tensor) -> Tensor:
    """The channels that aren't zero everywhere."""
    dims = (0, *range(2, x.ndim))
    return (x.amax(dims).ne(0) | x.amin(dims).ne(0)).nonzero().flatten()
