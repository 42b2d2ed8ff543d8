"""The clipped group Lasso: a penalty on the norm of each class's weights, which spares the classes with large norms.

Yang et al., "Non-uniform DNN Structured Subnets Sampling for Dynamic Inference", section III.A.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from autogate.methods.method import Gates, KernelSums, Method, Proposal, Step
from autogate.methods.proximal import clipped_threshold
from autogate.steering import Range

_LEAST_ALPHA = 1e-30
"""Factors of many steps multiply; float32 can hold them down to here."""


@dataclass(frozen=True, kw_only=True, repr=False)
class ClippedLasso(Method):
    """Group Lasso with weight penalty clipping, equation 3: lambda times the sum of min(|W_i|, delta) over classes.

    |W_i| is the norm of all weights of class i: its rows and columns in all kernels, and its entries in biases and
    norms. delta is `a` times the mean of these norms over the classes of a layer (of all layers that share a width),
    dead ones included, and counts as a constant. After each step of the optimizer follows the penalty's proximal step,
    which takes weights to exact zero. Lambda is steered to the targets, or fixed.

        >>> import timm, torch, autogate
        >>> model = timm.create_model("test_resnet", num_classes=10)
        >>> model = autogate.prepare(model, torch.randn(2, 3, 32, 32), flops=0.22, method=autogate.ClippedLasso(a=0.3))
        >>> autogate.gates(model).learner.method
        ClippedLasso(a=0.3)

    The factors of all steps are multiplied in `alpha`, so a class's gate tells how far the penalty has shrunk it. Its
    state is `norm`, the norm of each class after the latest step (float32, shape (classes,)).

    Attributes:
        lam, reach, least_steps, short, keep, tolerance, patience, gain, integral_gain, deadline, escalation: how the
            run goes to its targets, see `autogate.steering.Course`.
        a: the clipping threshold as a part of the mean norm. With `math.inf` nothing is clipped: the group Lasso of
            equation 1.
    """

    a: float = 0.75

    def _ranges(self) -> Iterator[Range]:
        yield from super()._ranges()
        yield "a", self.a > 0, "positive"

    @property
    def scales_all(self) -> bool:
        return True

    @property
    def reads_after(self) -> bool:
        return True

    def start(self, size: int) -> dict[str, Tensor]:
        return {"norm": torch.zeros(size)}

    def factor(self, alpha: Tensor, state: Mapping[str, Tensor]) -> Tensor:
        return alpha

    def read(self, sums: KernelSums, gate: Tensor, live: Tensor) -> Tensor:
        """The norm of each class, without the factors folded so far."""
        return torch.where(live, sums.squares().sqrt() / gate, 0.0)

    def propose(self, gates: Gates, reading: Tensor, step: Step) -> Proposal:
        """The proximal step; classes that it takes to zero are the candidates.

        While lambda is steered, it moves classes whose death brings a target nearer. How far, is relative to the mean
        norm of live classes.
        """
        norm = reading * gates.alpha
        if not step.movement:
            return Proposal(gates.alpha, None, norm, {"norm": norm}, 0.0)
        delta = self.a * step.groups.means(norm)
        if self.lam is None:
            beta = step.movement * norm.sum() / gates.live.sum().clamp(min=1)
            pressed = gates.live & (step.price > 0)
        else:
            beta = torch.as_tensor(self.lam * step.lr)
            pressed = gates.live
        shrunk = torch.where(pressed, clipped_threshold(norm, beta, delta), norm)
        candidates = pressed & (shrunk == 0)
        part = torch.where(candidates | (norm == 0), 1.0, shrunk / norm)
        alpha = torch.where(gates.live, (gates.alpha * part).clamp(min=_LEAST_ALPHA), gates.alpha)
        # The beta that takes a class to zero.
        importance = torch.maximum(norm, norm.square() / (2 * delta))
        balance = float(beta) / step.lr if step.lr else 0.0
        return Proposal(alpha, candidates, importance, {"norm": norm * part}, balance)
