"""Predict what a kernel made of what it read, from what is left: ridge regression whose penalty is on the change."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

PENALTIES = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""Candidates, relative to the mean variance of what is left. The one that predicts held-out rows best is taken."""

HELD_OUT = 4
"""The last of so many parts of the rows is held out. Rows are in the order of the samples."""


class Prediction(NamedTuple):
    """wanted ~ kept @ taken + constant.

    Attributes:
        taken: shape (kept channels, columns).
        constant: shape (columns,).
    """

    taken: Tensor
    constant: Tensor

    def of(self, kept: Tensor) -> Tensor:
        return kept @ self.taken + self.constant


def predict(kept: Tensor, wanted: Tensor, plain: Tensor, kernel: Tensor, constants: bool) -> Prediction | None:
    """The prediction of a kernel's outputs, `wanted @ kernel.T`, from `kept`.

    For each channel x of `wanted`, it minimises |x - kept taken - constant|² + penalty |taken - plain|². So where the
    rows say little, a kernel's columns stay as they are. The penalty is chosen on held-out rows, by the error of the
    outputs.

    Args:
        kept: what is left, shape (rows, kept channels).
        wanted: shape (rows, channels).
        plain: what `taken` is without any change: 1 where a channel is itself, shape (kept channels, channels).
        kernel: shape (outputs, channels).
        constants: whether there may be a constant.

    Returns:
        With a column for each output; None if no prediction is better than the kernel as it is.
    """
    outputs = kernel.T
    few = len(kernel) < len(outputs)  # then solve for outputs, which are sums of channels, in place of channels
    if few:
        wanted, plain = wanted @ outputs, plain @ outputs
    cut = len(kept) - len(kept) // HELD_OUT
    some, held = _Fit(kept[:cut], wanted[:cut], plain, constants), slice(cut, None)
    metric = None if few else outputs @ kernel

    def error(found: Prediction) -> float:
        missed = found.of(kept[held]) - wanted[held]
        return float(((missed if metric is None else missed @ metric) * missed).sum())

    errors = {penalty: error(some.with_penalty(penalty)) for penalty in (*PENALTIES, None)}
    best = min(errors, key=lambda penalty: errors[penalty])
    if not errors[best] < error(Prediction(plain, torch.zeros_like(wanted[0]))):
        return None
    found = _Fit(kept, wanted, plain, constants).with_penalty(best)
    return found if few else Prediction(found.taken @ outputs, found.constant @ outputs)


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
