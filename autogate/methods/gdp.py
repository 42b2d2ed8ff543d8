"""GDP: gates that polarize, moved by the loss's gradient and pushed to zero by a price on channels.

Guo et al., "GDP", section 3.4: equations 8 and 9, algorithm 1 with N = 1.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from autogate.methods.gate_function import epsilon_at, gate_slope, gate_value
from autogate.methods.method import Gates, KernelSums, Method, Proposal, Step
from autogate.methods.proximal import shrinkage, soft_threshold
from autogate.methods.sensitivity import observed, price_per_sensitivity
from autogate.steering import Range, Schedule


@dataclass(frozen=True, kw_only=True, repr=False)
class GDP(Method):
    """Gates with differentiable polarization, with prices weighed by sensitivity: the default method.

    Guo et al., "GDP: Stabilized Neural Network Pruning via Gates with Differentiable Polarization" (ICCV 2021). What
    differs from the paper, and why, is in docs/architecture.md.

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

    @property
    def gate_state(self) -> tuple[str, ...]:
        return ("epsilon",)

    def start(self, size: int) -> dict[str, Tensor]:
        return {
            "epsilon": torch.tensor(self.epsilon_start, dtype=torch.float64),
            "sensitivity": torch.zeros(size, dtype=torch.float64),
        }

    def factor(self, alpha: Tensor, state: Mapping[str, Tensor]) -> Tensor:
        """g(alpha), equation 2."""
        return gate_value(alpha, state["epsilon"])

    def read(self, sums: KernelSums, gate: Tensor, live: Tensor) -> Tensor:
        """dL/dg of each class: what the gradient of a gate on the activation would be."""
        return torch.where(live, sums.gradient_products() / gate, 0.0)

    def let_through(self, gate: Tensor) -> Tensor:
        """A part in proportion to the gate's square, where the gate is nearly closed.

        That is what a gate in the forward pass comes to: it scales the kernel's gradient once, and the effect of the
        kernel's change once more. Without it the optimizer would soon fill a column that the gate has emptied, and a
        gate that opens again would magnify that.
        """
        return torch.where(gate < self.nearly_closed, (gate / self.nearly_closed) ** 2, 1.0)

    def propose(self, gates: Gates, reading: Tensor, step: Step) -> Proposal:
        """A gradient step, then the proximal step; classes that it takes to zero are the candidates."""
        sensitivity = observed(gates.state["sensitivity"], reading, self.decay)
        rate = self.alpha_rate * step.lr / step.peak if step.peak else 0.0
        bound = self.step_bound(step.schedule)
        alpha = self.descend(gates, reading, rate, bound)
        importance, candidates = alpha.abs(), None
        if step.movement > 0:
            price = price_per_sensitivity(step.price, sensitivity, gates.live, self.damping)
            shrunk = soft_threshold(alpha, shrinkage(price, step.movement, bound))
            candidates = gates.live & (shrunk == 0)
            alpha = torch.where(candidates, alpha, shrunk)
        epsilon = epsilon_at(step.number, step.schedule.reach_steps, self.epsilon_start, self.epsilon_end)
        return Proposal(
            alpha=alpha,
            candidates=candidates,
            importance=importance,
            state={"epsilon": torch.full_like(gates.state["epsilon"], epsilon), "sensitivity": sensitivity},
            balance=step.movement / rate if rate else 0.0,
        )

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
        moved = gates.alpha - torch.clamp(rate * gradient * slope, -bound, bound)
        sign = torch.sign(gates.alpha)
        nearest = torch.clamp(gates.alpha.abs(), max=self.open_alpha)
        return sign * torch.maximum(sign * moved, nearest)

    def hold_open(self, alpha: Tensor, pressed: bool) -> Tensor:
        least = self.least_alpha if pressed else self.open_alpha
        return torch.where(alpha.abs() < least, torch.copysign(alpha.new_tensor(least), alpha), alpha)

    def is_at_rest(self, step: int, schedule: Schedule) -> bool:
        """Epsilon is at its end: live gates are at least 0.95 open, and no gradient moves them."""
        return step >= schedule.reach_steps
