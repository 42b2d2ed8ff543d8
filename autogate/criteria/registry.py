"""The registry of criteria: which function scores classes under which name."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from autogate.criteria.readings import Readings
from autogate.gating import GateBank
from rewriters import AutogateError

Needs = Literal["weights", "inputs", "loss"]
"""What a criterion reads: the weights alone; batches of inputs too; or batches with their labels, and a loss."""

By = str | Callable[[GateBank], Tensor]
"""The name of a criterion, or a function that gets the gate bank and returns one score a class, shape (classes,)."""


@dataclass(frozen=True)
class Criterion:
    """A criterion that was registered.

    Attributes:
        name: what callers know it by.
        needs: what it reads.
        score: from readings to one number a class, shape (classes,). The classes with the smallest close first; one
            with an infinite score stays.
    """

    name: str
    needs: Needs
    score: Callable[[Readings], Tensor]


CRITERIA: dict[str, Criterion] = {}


def criterion(name: str, needs: Needs = "weights") -> Callable[[Callable[[Readings], Tensor]], Criterion]:
    """Register the decorated function as the criterion of this name.

    Args:
        name: its name for `autogate.close(model, by=name)`.
        needs: what it reads.
    """

    def register(score: Callable[[Readings], Tensor]) -> Criterion:
        CRITERIA[name] = Criterion(name, needs, score)
        return CRITERIA[name]

    return register


def find_criterion(name: str) -> Criterion:
    """The criterion of this name.

    Raises:
        AutogateError: there is none; names that look like it are suggested.
    """
    if name not in CRITERIA:
        near = difflib.get_close_matches(name, CRITERIA, n=3)
        hint = f"Did you mean {' or '.join(map(repr, near))}? " if near else ""
        raise AutogateError(
            f"there is no criterion {name!r}.",
            where="close",
            remedy=f"{hint}There are {', '.join(CRITERIA)}, or pass a function of the gate bank.",
        )
    return CRITERIA[name]
