"""The course of a training with saliency modules: three phases, and the way to the budget.

1. Warm-up: the modules train alone, without a penalty (section 4.1.2 of the paper).
2. All of the model trains, and the penalty takes the mean cost to the budget.
3. Noise and soft codes fade, so that the end of the training computes what inference computes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import ceil
from typing import NamedTuple

from autogate.saliency.method import SANP
from autogate.steering import Course, Schedule
from rewriters import AutogateError

MEMORY = 0.7
"""What a step keeps of the running mean of the cost."""

LEAK = 10
"""How much faster the memory of past errors fades below the wanted cost than it grows above: a channel that is closed
too early has to wait until the loss opens it."""


class RunState(NamedTuple):
    """How far a run is.

    Attributes:
        steps: optimizer steps taken.
        cost: the running mean of the share of the FLOPs that an image takes; 0 before the first step.
        integral: the part of the pressure that is due to past errors.
        threshold: what the decisive value of a score must exceed for its channel to be computed.
    """

    steps: int = 0
    cost: float = 0.0
    integral: float = 0.0
    threshold: float = 0.0


class Dose(NamedTuple):
    """What the modules get for the next step.

    Attributes:
        push: lambda / N of equation 9.
        noise: standard deviation of the noise of equation 7.
        soft: the share of images that get s1.
        threshold: as in `RunState`.
    """

    push: float
    noise: float
    soft: float
    threshold: float


@dataclass(frozen=True)
class Run:
    """The course of a training with saliency modules.

    Attributes:
        flops: the share of the FLOPs that an image may take on average, in (0, 1).
        steps: optimizer steps.
        warmup: the part of them in which the modules train alone.
        method: settings.

    Raises:
        AutogateError: a value is outside of its range.
    """

    flops: float
    steps: int
    warmup: float = 0.1
    method: SANP = field(default_factory=SANP)

    def __post_init__(self) -> None:
        for name, holds, wanted in (
            ("flops", isinstance(self.flops, (int, float)) and 0 < self.flops < 1, "in (0, 1)"),
            ("steps", self.steps >= 1, "at least 1"),
            ("warmup", 0 <= self.warmup <= 0.5, "in [0, 0.5]"),
        ):
            if not holds:
                raise AutogateError(f"{name} is {getattr(self, name)!r}; it must be {wanted}.", where="prepare")

    @property
    def warm_steps(self) -> int:
        """Steps in which the modules train alone."""
        return ceil(self.warmup * self.steps)

    def wanted(self, steps: int) -> float:
        """The share of the FLOPs wanted after so many steps: a straight line from 1 to the budget."""
        joint = Schedule(max(1, self.steps - self.warm_steps), Course(reach=self.method.reach))
        return self.flops + (1 - self.flops) * joint.wanted(max(0, steps - self.warm_steps))

    def step(self, state: RunState, share: float) -> RunState:
        """The state after a step whose images took this share of the FLOPs on average."""
        steps = state.steps + 1
        cost = share if not state.cost else MEMORY * state.cost + (1 - MEMORY) * share
        if steps <= self.warm_steps or self.method.lam is not None:
            return state._replace(steps=steps, cost=cost)
        error = self._error(steps, cost)
        gain = self.method.integral_gain / max(1.0, self.method.reach * self.steps)
        integral = state.integral + gain * error * (1 if error > 0 else LEAK)
        threshold = state.threshold
        if self.wanted(steps) <= self.flops:
            threshold += self.method.trim * (cost / self.flops - 1)
        return RunState(
            steps, cost, min(max(integral, 0.0), self.method.most),
            min(max(threshold, -self.method.widest), self.method.widest),
        )  # fmt: skip

    def dose(self, state: RunState, level: float, outputs: int) -> Dose:
        """What the modules get after this state.

        Args:
            state: so far.
            level: the running root mean square of the channels' gradients, over all layers.
            outputs: N of equation 9: channels of all layers.
        """
        fade = self._fade(state.steps)
        return Dose(self._push(state, level, outputs), self.method.noise * fade, 0.5 * fade, state.threshold)

    def _push(self, state: RunState, level: float, outputs: int) -> float:
        if state.steps < self.warm_steps or not state.cost:
            return 0.0
        if self.method.lam is not None:  # equation 10
            return self.method.lam * (state.cost - self.flops) / outputs
        pressure = self.method.gain * self._error(state.steps, state.cost) + state.integral
        return level * min(max(pressure, 0.0), self.method.most)

    def _error(self, steps: int, cost: float) -> float:
        """How much more than wanted is left, in parts of the way to the budget."""
        return (cost - self.wanted(steps)) / (1 - self.flops)

    def _fade(self, steps: int) -> float:
        """1 until noise and soft codes fade, 0 at the end."""
        hard = self.method.hard
        if not hard:
            return 1.0
        return min(1.0, max(0.0, (1 - hard - steps / self.steps) / hard))
