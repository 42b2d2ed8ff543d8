"""Gates without alpha: the two variants that the paper compares GDP with.

Guo et al., "GDP", section 4.3. x is the norm of a class's columns, over all kernels that read it. Everything here is
relative to x as the run began: then one epsilon of 0.1 gives each class the gate 1 / 1.1 that the paper starts with.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from autogate.methods.gate_function import gate_slope, gate_value
from autogate.methods.proximal import soft_threshold


class Columns(NamedTuple):
    """The columns of each class after a step of the optimizer; all of shape (classes,).

    Attributes:
        norm: their norms, as they are in the kernels.
        start: x as the run began.
        x: x before the step, relative to `start`.
    """

    norm: Tensor
    start: Tensor
    x: Tensor


class Moved(NamedTuple):
    """After a step; all of shape (classes,).

    Attributes:
        x: x of the classes that survive, relative to its start.
        dies: classes that the step takes to zero, bool.
        factor: what the columns of those that survive are to be multiplied by.
    """

    x: Tensor
    dies: Tensor
    factor: Tensor


def columns_of(norm: Tensor, state: Mapping[str, Tensor], gated: bool) -> Columns:
    """The columns with these norms. In the first step x begins, as if nothing had moved.

    Args:
        norm: of the columns after the optimizer's step, shape (classes,).
        state: has `first_norm`, `norm` and `epsilon`.
        gated: whether the kernels hold the gates.
    """
    begun = state["first_norm"] > 0
    scale = gate_value(torch.ones_like(norm), state["epsilon"]).to(norm.dtype) if gated else 1.0
    start = torch.where(begun, state["first_norm"], norm / scale)
    return Columns(norm, start, torch.where(begun, state["norm"], torch.ones_like(norm)))


def through_gates(columns: Columns, push: Tensor, epsilon: Tensor, after: float) -> Moved:
    """Equation 10: the forward runs on W g(x), and x is pushed to zero by the proximal step.

    The kernels hold V = W g(x), whose norm is x g(x). Of the optimizer's change to V, g^2 takes effect, as W would have
    changed but for the gate's own slope. To first order x changes by (g + x g') times the change of V's norm.

    Args:
        columns: the columns.
        push: how far x is pushed, shape (classes,).
        epsilon: of the gates in the kernels.
        after: epsilon from now on.
    """
    x = columns.x
    gate, slope = gate_value(x, epsilon).to(x.dtype), gate_slope(x, epsilon).to(x.dtype)
    change = (columns.norm / columns.start - x * gate) / gate.square().clamp(min=1e-12)
    descended = (x + (gate + x * slope) * change).clamp(min=1e-12)
    moved = soft_threshold(descended, push)
    held = torch.where(moved == 0, descended, moved)
    return Moved(held, moved == 0, columns.start * held * gate_value(held, after) / columns.norm)


def by_penalty(columns: Columns, push: Tensor, epsilon: Tensor) -> Moved:
    """Equation 11: no gate in the forward; x goes down the slope of the penalty, the prices times g(x).

    Args:
        columns: the columns.
        push: how far x is pushed where the gate's slope is 1, shape (classes,).
        epsilon: of the gates.
    """
    x = columns.norm / columns.start
    moved = (x - push * gate_slope(x, epsilon).to(x.dtype)).clamp(min=0)
    held = torch.where(moved == 0, x, moved)
    return Moved(held, moved == 0, held / x.clamp(min=1e-12))
