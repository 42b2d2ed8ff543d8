"""How a run goes to its targets, whatever the method: the settings that all methods share."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

from rewriters import AutogateError

Range = tuple[str, bool, str]
"""A field's name, whether its value is in its range, and the range in words."""


@dataclass(frozen=True, kw_only=True, repr=False)
class Course:
    """How a run goes to its targets. Every method has these fields.

    Attributes:
        lam: lambda, if it is fixed. There is no budget then: those classes die that this lambda takes to zero. If None,
            lambda is steered to the targets.
        reach: part of the steps over which the wanted shares fall from 1 to the targets. Targets that are met early
            leave the remaining channels more time to learn; docs/benchmarks.md has the figures.
        least_steps: the way down takes at least so many steps, because one batch says little about which classes
            matter.
        short: but at most this part of the run, because what is left needs steps to learn.
        keep: the least width that learning leaves a layer, as a part of the width it would have if all layers were
            narrowed uniformly for the same targets. Without it an expensive layer would be emptied before its
            gradients could hold it (Guo et al., "GDP", section 4.3). A larger value removes channels elsewhere that the
            loss depends on.
        tolerance: how far below the target (and, where nothing else fits, above it) a share may end.
        patience: time, relative to the way down, after which a missed target is met by a cruder choice of channels.
        gain: pressure per unit of error: how far the model is from its targets, beyond what is wanted. With 10, an
            error of a tenth takes a class of mean price to zero in the time of the way down.
        integral_gain: pressure per unit of error that has lasted for the way down.
        deadline: the targets are met within this part of the steps.
        escalation: between the end of patience and the deadline the pressure also grows by a factor of e to this.
            Gradients pull hardest near zero and can resist a steady lambda; they can't resist this.

    Raises:
        AutogateError: for a value outside its range.
    """

    lam: float | None = None
    reach: float = 0.1
    least_steps: int = 200
    short: float = 0.35
    keep: float = 0.2
    tolerance: float = 0.01
    patience: float = 1.15
    gain: float = 10.0
    integral_gain: float = 20.0
    deadline: float = 0.9
    escalation: float = 16.0

    def __post_init__(self) -> None:
        for name, holds, wanted in self._ranges():
            if not holds:
                raise AutogateError(
                    f"{name} is {getattr(self, name)!r}; it must be {wanted}.", where=type(self).__name__
                )

    def _ranges(self) -> Iterator[Range]:
        """The range of each field."""
        yield "lam", self.lam is None or self.lam > 0, "positive"
        yield "reach", 0 < self.reach <= 0.7, "in (0, 0.7]"
        yield "least_steps", self.least_steps >= 0, "0 or more"
        yield "short", 0 < self.short <= 0.7, "in (0, 0.7]"
        yield "keep", 0 <= self.keep <= 1, "in [0, 1]"
        yield "tolerance", self.tolerance > 0, "positive"
        yield "patience", self.patience > 1, "above 1"
        yield "gain", self.gain > 0, "positive"
        yield "integral_gain", self.integral_gain >= 0, "0 or more"
        yield "deadline", 0 < self.deadline <= 1, "in (0, 1]"
        yield "escalation", self.escalation >= 0, "0 or more"

    def settings(self) -> dict[str, Any]:
        """The fields that differ from their defaults, by name."""
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        return {field.name: given[field.name] for field in fields(self) if given[field.name] != field.default}

    def __repr__(self) -> str:
        """The call that makes this value."""
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in self.settings().items())})"
