"""Predict what a kernel read, from what is left of it: ridge regression whose penalty is on the change."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

PENALTIES = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""Candidates, relative to the mean variance of what is left. The one that predicts held-out rows best is taken."""

HELD_OUT = 4
"""The last of so many parts of the rows is held out. Rows are in the order of the samples."""


class Prediction(NamedTuple):
    """x ~ kept @ taken + constant.

    Attributes:
        taken: shape (kept channels, channels).
        constant: shape (channels,).
    """

    taken: Tensor
    constant: Tensor

    def of(self, kept: Tensor) -> Tensor:
        return kept @ self.taken + self.constant


def predict(kept: Tensor, wanted: Tensor, plain: Tensor, kernel: Tensor, constants: bool) -> Prediction | None:
    """The prediction of `wanted` from `kept` that a kernel turns into the least error of its outputs.

    It minimises |wanted - kept taken - constant|² + penalty |taken - plain|². So where the rows say little, a kernel's
    columns stay as they are. The penalty is chosen on held-out rows, by the error that the kernel makes of it.

    Args:
        kept: what is left, shape (rows, kept channels).
        wanted: shape (rows, channels).
        plain: what `taken` is without any change: 1 where a channel is itself, shape (kept channels, channels).
        kernel: shape (outputs, channels).
        constants: whether there may be a constant.

    Returns:
        None if no prediction is better than the kernel as it is.
    """
    cut = len(kept) - len(kept) // HELD_OUT
    some, held = _Fit(kept[:cut], wanted[:cut], plain, constants), slice(cut, None)
    metric = kernel.T @ kernel

    def error(found: Prediction) -> float:
        missed = found.of(kept[held]) - wanted[held]
        return float(((missed @ metric) * missed).sum())

    least, best = error(Prediction(plain, torch.zeros_like(wanted[0]))), None
    for penalty in (*PENALTIES, None):
        found = error(some.with_penalty(penalty))
        if found < least:
            least, best = found, (penalty,)
    return None if best is None else _Fit(kept, wanted, plain, constants).with_penalty(*best)


class _Fit:
    """The normal equations of the regression over some rows."""

    def __init__(self, kept: Tensor, wanted: Tensor, plain: Tensor, constants: bool):
        self._mean, self._target = (x.mean(0) if constants else torch.zeros_like(x[0]) for x in (kept, wanted))
        centred = kept - self._mean
        self._plain = plain
        self._gram = (centred.T @ centred / len(kept)).double()
        missed = wanted - self._target - centred @ plain
        self._products = (centred.T @ missed / len(kept)).double()

    def with_penalty(self, penalty: float | None) -> Prediction:
        """The solution; None changes nothing but the constant."""
        taken = self._plain
        scale = self._gram.diagonal().sum() / max(1, len(self._gram))
        if penalty is not None and scale > 0:
            gram = self._gram + penalty * scale * torch.eye(len(self._gram)).to(self._gram)
            factor, failed = torch.linalg.cholesky_ex(gram)
            if not failed:
                taken = taken + torch.cholesky_solve(self._products, factor).to(taken)
        return Prediction(taken, self._target - self._mean @ taken)
