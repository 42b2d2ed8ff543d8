"""The course of a run to its targets: how fast, in what portions, how closely."""

from __future__ import annotations

from dataclasses import dataclass

from rewriters import AutogateError

DEFAULT_STEPS = 10_000
"""Length of a run if the caller names none: 25 epochs of CIFAR-10, or 8 of ImageNet with batches of 1024."""

PATIENCE = 1.15
"""Time, in units of `reach`, after which a missed target is met by a cruder choice of channels."""

LEAST_STEPS = 200
"""The way down takes at least this many steps, because one batch says little about which classes matter."""

SHORT = 0.35
"""But at most this part of the run, because what is left needs steps to learn."""


@dataclass(frozen=True)
class Schedule:
    """The course of a run to its targets: how fast, in what portions, how closely.

    Attributes:
        steps: optimizer steps of the run. The targets and epsilon are reached within them. Training after them is plain
            fine-tuning of what is left.
        reach: part of the steps over which the wanted shares fall from 1 to the targets, and epsilon to its end. If
            these would be less than `LEAST_STEPS` steps, they are a larger part of the run. Targets that are met
            early leave the remaining channels more time to learn; docs/benchmarks.md has the figures.
        bound: the longest way that a gradient or a price moves alpha in one step. Short runs need longer steps: see
            `step_bound`.
        keep: the least width that learning leaves a layer, as a part of the width it would have if all layers were
            narrowed uniformly for the same targets. Without it an expensive layer would be emptied before its
            gradients could hold it (section 4.3). A larger value removes channels elsewhere that the loss depends on.
        tolerance: how far below the target (and, where nothing else fits, above it) a share may end.
        round_to: a layer that loses channels keeps a multiple of this number. A layer that loses none keeps its
            width.

    Raises:
        AutogateError: for a setting outside its range.
    """

    steps: int = DEFAULT_STEPS
    reach: float = 0.1
    bound: float = 0.02
    keep: float = 0.2
    tolerance: float = 0.01
    round_to: int = 1

    def __post_init__(self) -> None:
        ranges = [
            ("steps", self.steps >= 1, "at least 1"),
            ("reach", 0 < self.reach <= 0.7, "in (0, 0.7]"),
            ("bound", self.bound > 0, "positive"),
            ("keep", 0 <= self.keep <= 1, "in [0, 1]"),
            ("tolerance", self.tolerance > 0, "positive"),
            ("round_to", self.round_to >= 1 and self.round_to == int(self.round_to), "a whole number from 1 up"),
        ]
        for name, holds, wanted in ranges:
            if not holds:
                raise AutogateError(f"{name} is {getattr(self, name)!r}; it must be {wanted}.", where="prepare")

    @property
    def reach_steps(self) -> float:
        """Steps over which the wanted shares and epsilon fall."""
        return max(1.0, self.reach * self.steps, min(LEAST_STEPS, SHORT * self.steps))

    @property
    def patience_steps(self) -> float:
        """Steps after which a missed target is met by a cruder choice of channels."""
        return PATIENCE * self.reach_steps

    @property
    def step_bound(self) -> float:
        """`bound`, or in a short run four times the steady pace from 1 to 0, if that is larger."""
        return max(self.bound, 4 / self.reach_steps)

    def wanted(self, step: int) -> float:
        """The distance from the targets (see `Targets`) wanted after `step` steps: a straight line from 1 to 0."""
        return 1 - min(1.0, step / self.reach_steps)
