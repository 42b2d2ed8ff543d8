"""Guards in rewritten forwards: what a trace took from the example has to be so whenever the forward runs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx.node import has_side_effect


class ShapeGuardError(RuntimeError):
    """A rewritten forward ran with arguments or attributes for which its control flow differs from the traced one.

    Attributes:
        where: path of the module, once the error has left its forward.
    """

    where: str


@has_side_effect
def guard(value: Any, expected: Any, what: str = "a value") -> None:
    """Raise unless `value` is the one that the control flow was traced with; `what` says what it is, and where."""
    if (
        not torch.jit.is_tracing() and value != expected
    ):  # jit.trace turns sizes into tensors, and records one case anyway
        remedy = "give prepare example inputs of the kind and shape that the model is run with"
        raise ShapeGuardError(_differs(value, expected, what, remedy))


@has_side_effect
def guard_attribute(value: Any, expected: Any, what: str) -> None:
    """As `guard`, for what only depends on attributes of modules."""
    if value != expected:
        raise ShapeGuardError(_differs(value, expected, what, "set it before prepare, and leave it as it was then"))


GUARDS = (guard, guard_attribute)


def _differs(value: Any, expected: Any, what: str, remedy: str) -> str:
    return f"this forward was traced where {what} was {_told(expected)}, which now is {_told(value)}: {remedy}"


def _told(value: Any) -> str:
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)


def kinds(value: Any) -> Any:
    """What sort of thing a value is: a tensor, None, a list of two numbers ..."""
    if value is None or isinstance(value, Tensor):
        return None if value is None else "tensor"
    if isinstance(value, (tuple, list)):
        return type(value).__name__, *map(kinds, value)
    if isinstance(value, dict):
        return "dict", *((str(key), kinds(entry)) for key, entry in value.items())
    return type(value).__name__
