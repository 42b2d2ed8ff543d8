"""GDP: gates that polarize, moved by the loss's gradient and pushed to zero by a price on channels.

Guo et al., "GDP", section 3.4: equations 8 and 9, algorithm 1 with N = 1.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from autogate.methods.gate_function import epsilon_at, gate_slope, gate_value
from autogate.methods.kernel_gates import by_penalty, columns_of, through_gates
from autogate.methods.method import Gates, KernelSums, Method, Proposal, Step
from autogate.methods.proximal import alternating_relaxation, shrinkage, soft_threshold
from autogate.methods.sensitivity import observed, price_per_sensitivity
from autogate.steering import Range, Schedule
from rewriters import AutogateError


@dataclass(frozen=True, kw_only=True, repr=False)
class GDP(Method):
    """Gates with differentiable polarization, with prices weighed by sensitivity: the default method.

    Guo et al., "GDP: Stabilized Neural Network Pruning via Gates with Differentiable Polarization" (ICCV 2021). What
    differs from the paper, and why, is in docs/methods.md.

        >>> import timm, torch, autogate
        >>> model = timm.create_model("test_resnet", num_classes=10)
        >>> model = autogate.prepare(model, torch.randn(2, 3, 32, 32), method=autogate.GDP(reach=0.2))
        >>> autogate.gates(model).learner.method
        GDP(reach=0.2)

    Its state is `epsilon`, the gates' smoothing constant (0-dim float64), and `sensitivity`, how much the loss depends
    on each gate (float64, shape (classes,); see `sensitivity.py`).

    Attributes:
        lam, reach, least_steps, short, keep, tolerance, patience, gain, integral_gain, deadline, escalation: how the
            run goes to its targets, see `autogate.steering.Course`. Epsilon reaches its end with the targets.
        bound: the longest way that a gradient or a price moves alpha in one step; in a short run four times the steady
            pace from 1 to 0, if that is larger.
        alpha_rate: alpha's learning rate when the kernels' is at its peak; it follows theirs.
        open_alpha: no gradient takes alpha nearer to zero than this, and without pressure no live alpha is nearer. With
            epsilon at its end such a gate is 0.95 open. So a gate ends open or exactly closed.
        least_alpha: the least alpha of a live class. Its gate is above 1e-9: as good as closed, and large enough to
            scale a float32 kernel down by it and up again.
        epsilon_start: epsilon of a fresh gate: alpha = 1 gives a gate of 0.909 (section 4.1).
        epsilon_end: epsilon at the end of its course: where the paper's own courses end (0.1 * 0.96**350 and
            0.1 * 0.9**140).
        decay: of the running mean of squared gradients, in a step: 0.99 looks back a hundred steps.
        damping: added to curvatures relative to their mean, so that no class counts as much less sensitive than others.
        gate: "alpha", or one of the two variants of section 4.3, without alpha: "kernel" has gates on the norms of
            kernel columns (equation 10), "penalty" the gate as a penalty on these norms (equation 11).
        weighed: divide prices by sensitivity.
        relative_rate: alpha's learning rate as a part of the kernels', in place of `alpha_rate`.
        epsilon_factor: epsilon is multiplied by this once an epoch, to the end of the run. If None, it falls to
            `epsilon_end` while the shares fall to the targets.
        epochs, steps_per_epoch: length of the run, for `epsilon_factor`.
        iterations: N of algorithm 1, for a fixed lambda.
        nearly_closed: below this gate a kernel column follows the optimizer only in part (see `let_through`).
    """

    bound: float = 0.02
    alpha_rate: float = 1e-4
    open_alpha: float = 1e-3
    least_alpha: float = 1e-5
    epsilon_start: float = 0.1
    epsilon_end: float = 5e-8
    decay: float = 0.99
    damping: float = 0.05
    nearly_closed: float = 0.5
    gate: Literal["alpha", "kernel", "penalty"] = "alpha"
    weighed: bool = True
    relative_rate: float | None = None
    epsilon_factor: float | None = None
    epochs: int | None = None
    steps_per_epoch: int | None = None
    iterations: int = 1

    @classmethod
    def published(
        cls, *, lam: float, epochs: int, steps_per_epoch: int, epsilon_factor: float = 0.96, iterations: int = 1,
        gate: Literal["alpha", "kernel", "penalty"] = "alpha",
    ) -> GDP:  # fmt: skip
        """The method to the letter of section 4.1, for comparisons with the paper. For anything else use `GDP()`.

        Alpha's learning rate is a tenth of the kernels', without weight decay. Epsilon falls from 0.1 to the end of the
        run. Lambda is fixed, prices are those of FLOPs, steps have no bound, and nothing lands on a budget. The
        optimizer moves kernels as if gates were in the forward; that is exact for SGD without momentum.

            >>> import autogate
            >>> method = autogate.GDP.published(lam=2e-3, epochs=350, steps_per_epoch=391)
            >>> method.run_steps, method.lam
            (136850, 0.002)

        Args:
            lam: lambda of equation 7, for FLOPs in units of the mean price of a channel in the dense model.
            epochs: length of the run: 350 on CIFAR-10, 140 on ImageNet.
            steps_per_epoch: optimizer steps in an epoch.
            epsilon_factor: what epsilon is multiplied by once an epoch: 0.96 on CIFAR-10, 0.9 on ImageNet.
            iterations: N of algorithm 1.
            gate: the method, or one of its variants.
        """
        return cls(
            lam=lam, gate=gate, bound=math.inf, nearly_closed=1.0, weighed=False, relative_rate=0.1,
            epsilon_factor=epsilon_factor, epochs=epochs, steps_per_epoch=steps_per_epoch, iterations=iterations,
        )  # fmt: skip

    def _ranges(self) -> Iterator[Range]:
        yield from super()._ranges()
        yield "bound", self.bound > 0, "positive"
        yield "alpha_rate", self.alpha_rate >= 0, "0 or more"
        yield "least_alpha", 0 < self.least_alpha <= self.open_alpha, "positive, and at most open_alpha"
        yield "epsilon_start", self.epsilon_start > 0, "positive"
        yield "epsilon_end", 0 < self.epsilon_end <= self.epsilon_start, "positive, and at most epsilon_start"
        yield "decay", 0 <= self.decay < 1, "in [0, 1)"
        yield "damping", self.damping > 0, "positive"
        yield "nearly_closed", 0 <= self.nearly_closed <= 1, "in [0, 1]"
        yield "gate", self.gate in ("alpha", "kernel", "penalty"), '"alpha", "kernel" or "penalty"'
        yield "epsilon_factor", self.epsilon_factor is None or 0 < self.epsilon_factor <= 1, "in (0, 1]"
        yield "steps_per_epoch", self.steps_per_epoch is None or self.steps_per_epoch >= 1, "at least 1"
        yield "iterations", self.iterations >= 1, "at least 1"

    @property
    def run_steps(self) -> int | None:
        return self.epochs * self.steps_per_epoch if self.epochs and self.steps_per_epoch else None

    @property
    def reads_after(self) -> bool:
        return self.gate != "alpha"

    @property
    def gate_state(self) -> tuple[str, ...]:
        return ("epsilon",) if self.gate == "alpha" else ()

    def start(self, size: int) -> dict[str, Tensor]:
        if self.epsilon_factor is not None and self.steps_per_epoch is None:
            raise AutogateError(
                "epsilon falls once an epoch.", where="epsilon_factor", remedy="Pass steps_per_epoch, too."
            )
        epsilon = torch.tensor(self.epsilon_start, dtype=torch.float64)
        if self.gate != "alpha":
            return {"epsilon": epsilon, "first_norm": torch.zeros(size), "norm": torch.ones(size)}
        return {"epsilon": epsilon, "sensitivity": torch.zeros(size, dtype=torch.float64)}

    def factor(self, alpha: Tensor, state: Mapping[str, Tensor]) -> Tensor:
        """g(alpha), equation 2."""
        return gate_value(alpha, state["epsilon"]) if self.gate == "alpha" else alpha

    def read(self, sums: KernelSums, gate: Tensor, live: Tensor) -> Tensor:
        """dL/dg of each class: what the gradient of a gate on the activation would be."""
        if self.gate != "alpha":
            return torch.where(live, sums.squares().sqrt() / gate, 0.0)
        return torch.where(live, sums.gradient_products() / gate, 0.0)

    def let_through(self, gate: Tensor, state: Mapping[str, Tensor]) -> Tensor:
        """A part in proportion to the gate's square, where the gate is nearly closed.

        That is what a gate in the forward pass comes to: it scales the kernel's gradient once, and the effect of the
        kernel's change once more. Without it the optimizer would soon fill a column that the gate has emptied, and a
        gate that opens again would magnify that.
        """
        if self.gate == "penalty":
            return torch.ones_like(gate)
        if self.gate == "kernel":
            return gate_value(state["norm"], state["epsilon"]).to(gate.dtype) ** 2
        return torch.where(gate < self.nearly_closed, (gate / self.nearly_closed) ** 2, 1.0)

    def propose(self, gates: Gates, reading: Tensor, step: Step) -> Proposal:
        """A gradient step, then the proximal step; classes that it takes to zero are the candidates."""
        if self.gate != "alpha":
            return self._propose_by_norm(gates, reading, step)
        sensitivity = observed(gates.state["sensitivity"], reading, self.decay)
        rate = self._rate(step)
        movement = step.movement if self.lam is None else rate * self.lam
        bound = self.step_bound(step.schedule)
        alpha = self.descend(gates, reading, rate, bound)
        importance, candidates = alpha.abs(), None
        if step.movement > 0:
            price = self._price(alpha, gates, sensitivity, step, movement)
            shrunk = soft_threshold(alpha, shrinkage(price, movement, bound))
            candidates = gates.live & (shrunk == 0)
            alpha = torch.where(candidates, alpha, shrunk)
        return Proposal(
            alpha=alpha,
            candidates=candidates,
            importance=importance,
            state={"epsilon": torch.full_like(gates.state["epsilon"], self._epsilon(step)), "sensitivity": sensitivity},
            balance=movement / rate if rate and step.movement else 0.0,
        )

    def _propose_by_norm(self, gates: Gates, reading: Tensor, step: Step) -> Proposal:
        """The variants without alpha (see `kernel_gates.py`)."""
        epsilon, after = gates.state["epsilon"], self._epsilon(step)
        columns = columns_of(reading * gates.alpha, gates.state, self.gate == "kernel")
        start = columns.start.clamp(min=1e-12)
        columns = columns._replace(start=start, norm=torch.where(gates.live, columns.norm, start).clamp(min=1e-12))
        steepness = step.movement if self.lam is None else step.lr * self.lam / start
        push = step.price * steepness if step.movement else torch.zeros_like(start)
        if self.gate == "kernel":
            moved = through_gates(columns, push, epsilon, after)
        else:
            price = step.prices(gate_value(columns.x, epsilon)) if step.prices is not None else step.price
            push = price * steepness / (1.0 if self.lam is None else start) if step.movement else push
            moved = by_penalty(columns, push, epsilon)
        candidates = gates.live & moved.dies if step.movement else None
        state = {"epsilon": torch.full_like(epsilon, after), "first_norm": columns.start, "norm": moved.x}
        alpha = (gates.alpha * moved.factor).clamp(min=1e-30)
        balance = self.lam or step.movement / (step.lr or 1.0)
        return Proposal(alpha, candidates, moved.x, state, balance if step.movement else 0.0)

    def _rate(self, step: Step) -> float:
        """Alpha's learning rate."""
        if self.relative_rate is not None:
            return self.relative_rate * step.lr
        return self.alpha_rate * step.lr / step.peak if step.peak else 0.0

    def _epsilon(self, step: Step) -> float:
        """Epsilon after a step."""
        if self.epsilon_factor is None or self.steps_per_epoch is None:
            return epsilon_at(step.number, step.schedule.reach_steps, self.epsilon_start, self.epsilon_end)
        return self.epsilon_start * self.epsilon_factor ** (step.number // self.steps_per_epoch)

    def _price(self, alpha: Tensor, gates: Gates, sensitivity: Tensor, step: Step, movement: float) -> Tensor:
        """The price of each class that the proximal step takes: after N - 1 rounds of algorithm 1."""
        if self.weighed:
            return price_per_sensitivity(step.price, sensitivity, gates.live, self.damping)
        if self.iterations == 1 or step.prices is None:
            return step.price
        before = alternating_relaxation(alpha, step.prices, movement, gates.alpha, self.iterations - 1)
        return step.prices(before != 0)

    def step_bound(self, schedule: Schedule) -> float:
        """The longest way that alpha goes in one step."""
        return max(self.bound, 4 / schedule.reach_steps)

    def descend(self, gates: Gates, gradient: Tensor, rate: float, bound: float) -> Tensor:
        """Alpha after its bounded gradient step, equation 8. It does not reach zero.

        Near alpha = sqrt(epsilon / 3) the gate's slope is 0.65 / sqrt(epsilon), which grows without limit as epsilon
        falls. Unbounded steps would jump over zero and open a gate that was about to close.

        Args:
            gates: the gates before the step.
            gradient: dL/dg of each class, shape (classes,).
            rate: alpha's learning rate.
            bound: the longest step.
        """
        slope = gate_slope(gates.alpha, gates.state["epsilon"])
        if math.isinf(bound):  # the equation as it is
            return gates.alpha - rate * gradient * slope
        moved = gates.alpha - torch.clamp(rate * gradient * slope, -bound, bound)
        sign = torch.sign(gates.alpha)
        nearest = torch.clamp(gates.alpha.abs(), max=self.open_alpha)
        return sign * torch.maximum(sign * moved, nearest)

    def hold_open(self, alpha: Tensor, pressed: bool) -> Tensor:
        if self.gate != "alpha":
            return alpha
        least = self.least_alpha if pressed else self.open_alpha
        return torch.where(alpha.abs() < least, torch.copysign(alpha.new_tensor(least), alpha), alpha)

    def is_at_rest(self, step: int, schedule: Schedule) -> bool:
        """Epsilon is at its end: live gates are at least 0.95 open, and no gradient moves them."""
        return step >= schedule.reach_steps
