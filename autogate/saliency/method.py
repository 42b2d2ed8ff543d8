"""The settings of saliency modules: a frozen value."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from autogate.steering import Range
from rewriters import AutogateError


@dataclass(frozen=True, kw_only=True)
class SANP:
    """Self-adaptive network pruning (Chen et al., "Self-Adaptive Network Pruning"), with its settings.

    Attributes:
        reduction: r of equation 6. A module of a convolution with C outputs has C / r hidden units.
        noise: standard deviation of the noise of equation 7. The paper has 1. Behind trained weights that is much: the
            loss of a trained digits network began at 2.4 with 1, and at 0.7 with 0.3.
        sharpness: a channel is on where 1 + sharpness (s - 1) is positive, s being its score. The paper has 1. At the
            optimizer's rate scores leave 1 by a few hundredths in a short run, less than the noise, and say nothing.
        lam: lambda_0 of equation 10, if it is fixed; the paper has 0.01. If None, the pressure is steered.
        reach: part of the joint training over which the wanted cost falls to the budget.
        hard: over as long a part of the steps, noise and soft codes fade; and for as long at the end, training computes
            what inference computes. 0 keeps both to the end, as the paper does.
        gain: pressure per unit of error, in parts of the way to the budget, while lambda is steered. A pressure of one
            pushes as hard as the loss's gradient pulls on the average channel.
        integral_gain: pressure per unit of error that has lasted for the way to the budget.
        most: the largest pressure.
        trim: how fast the threshold that scores must exceed follows the cost, once the wanted cost is the budget: by so
            much for each step, if the cost is twice the budget.
        widest: the largest threshold, in either direction.

    Raises:
        AutogateError: for a value outside of its range.
    """

    reduction: float = 4.0
    noise: float = 0.3
    sharpness: float = 30.0
    lam: float | None = None
    reach: float = 0.3
    hard: float = 0.15
    gain: float = 3.0
    integral_gain: float = 2.0
    most: float = 1.0
    trim: float = 0.5
    widest: float = 10.0

    @classmethod
    def published(cls, lam: float = 0.01) -> SANP:
        """The paper to the letter: lambda by equation 10 with a fixed lambda_0, noise of N(0, 1) to the end.

        Such a lambda has to be tuned to the learning rate and the length of the run, or the budget is missed. It is for
        comparisons with the paper.
        """
        return cls(lam=lam, noise=1.0, sharpness=1.0, hard=0.0)

    def __post_init__(self) -> None:
        for name, holds, wanted in self._ranges():
            if not holds:
                raise AutogateError(f"{name} is {getattr(self, name)!r}; it must be {wanted}.", where="SANP")

    def _ranges(self) -> Iterator[Range]:
        yield "reduction", self.reduction > 0, "positive"
        yield "noise", self.noise >= 0, "0 or more"
        yield "sharpness", self.sharpness > 0, "positive"
        yield "lam", self.lam is None or self.lam > 0, "positive"
        yield "reach", 0 < self.reach <= 0.7, "in (0, 0.7]"
        yield "hard", 0 <= self.hard <= 0.3, "in [0, 0.3]"
        yield "gain", self.gain > 0, "positive"
        yield "integral_gain", self.integral_gain >= 0, "0 or more"
        yield "most", self.most > 0, "positive"
        yield "trim", self.trim >= 0, "0 or more"
        yield "widest", self.widest >= 0, "0 or more"
