"""What a method decides: the interface between a way of learning and all that any way of learning needs.

A method is a small frozen value, `GDP()`, that prints as the call that made it. It decides four things: what it reads
from the kernels, the factor that a gate puts on its kernel columns, how gates move in a step, and which classes may die
in it. It knows no model, no
kernel and no budget. The learner (`learner.py`) steers it to the budget; the gate bank (`autogate.gating`) stores its
state, takes its readings and folds its gates into the kernels.

    reading = method.read(sums, gate, live)             # before the optimizer moves the kernels
    proposal = method.propose(gates, reading, step)     # where gates go, and which may die
    alpha = method.hold_open(proposal.alpha, pressed)   # those that survive
    gate = method.factor(alpha, state)                  # what each class's columns are multiplied by
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from autogate.steering import Course, Pressure, Schedule


@dataclass(frozen=True)
class Gates:
    """The gates between two steps.

    Attributes:
        alpha: float32, shape (classes,): the parameter of each gate, zero for dead classes.
        live: bool, shape (classes,).
        state: the method's own tensors, by name.
        count: steps taken.
        pressure: the controller's memory.
        peak: the largest learning rate of the kernels so far.
        balance: lambda in the latest step, for prices relative to their mean.
    """

    alpha: Tensor
    live: Tensor
    state: Mapping[str, Tensor]
    count: int = 0
    pressure: Pressure = field(default_factory=Pressure)
    peak: float = 0.0
    balance: float = 0.0


class Grouping:
    """Which classes lie on the same sides, on a device.

    Args:
        groups: the classes of each group; every class is in one.
        device: where values per class are.
    """

    def __init__(self, groups: Sequence[Sequence[int]], device: torch.device):
        self._order = torch.tensor([label for group in groups for label in group], device=device, dtype=torch.int64)
        self._lengths = torch.tensor([len(group) for group in groups], device=device, dtype=torch.int64)
        self._group = torch.empty_like(self._order)
        self._group[self._order] = torch.arange(len(groups), device=device).repeat_interleave(self._lengths)

    def means(self, values: Tensor) -> Tensor:
        """For each class the mean over its group, shape (classes,), added in the same order in every run."""
        return torch.segment_reduce(values[self._order], "mean", lengths=self._lengths)[self._group]


@dataclass(frozen=True)
class Step:
    """What a method is told about a step.

    Attributes:
        number: number of the step; the first is 1.
        schedule: the course of the run.
        lr: learning rate of the kernels.
        peak: the largest learning rate so far, this step's included.
        price: price of each class relative to the mean price of live classes, shape (classes,).
        movement: how far a class of mean price is pushed towards zero; 0 if there is no pressure. If the method's
            lambda is fixed, all that it tells is whether there is pressure.
        groups: which classes share a width.
        prices: the prices if only so much of each class is alive, shape (classes,), in [0, 1]; if lambda is fixed.
    """

    number: int
    schedule: Schedule
    lr: float
    peak: float
    price: Tensor
    movement: float
    groups: Grouping
    prices: Callable[[Tensor], Tensor] | None = None


@dataclass(frozen=True)
class Proposal:
    """What a method wants to do in a step.

    Attributes:
        alpha: alpha after the step for the classes that survive it, shape (classes,).
        candidates: classes that may die in this step, bool, shape (classes,); None if there are none.
        importance: the least important candidates die first; shape (classes,).
        state: the method's own tensors after the step.
        balance: lambda of the step.
    """

    alpha: Tensor
    candidates: Tensor | None
    importance: Tensor
    state: Mapping[str, Tensor]
    balance: float


class KernelSums(Protocol):
    """Sums over the columns of each class, on all its gated kernels. A method calls for what it needs."""

    def gradient_products(self) -> Tensor:
        """<dL/dV, V> of each class, V being the gated kernel; shape (classes,).

        NaN throughout if any kernel's gradient is not finite.
        """

    def squares(self) -> Tensor:
        """<V, V> of each class, shape (classes,)."""


@dataclass(frozen=True, kw_only=True, repr=False)
class Method(Course, ABC):
    """A way of learning which channels a model can do without.

    A method holds settings alone: its own fields, and those of `Course`. What changes from step to step is in tensors,
    which the gate bank stores as buffers: checkpoints, copies and device moves include them.
    """

    @property
    def run_steps(self) -> int | None:
        """Length of the run in optimizer steps, if the method knows it."""
        return None

    @property
    def scales_all(self) -> bool:
        """Whether a class's gate scales all its parameters, or the kernel columns that read its channels alone."""
        return False

    @property
    def reads_after(self) -> bool:
        """Whether the method reads the kernels after the optimizer has moved them, or before."""
        return False

    @property
    def gate_state(self) -> tuple[str, ...]:
        """Names of the state tensors that `factor` depends on."""
        return ()

    @abstractmethod
    def start(self, size: int) -> dict[str, Tensor]:
        """The method's own tensors before the first step, by name. They must be of floating-point type."""

    @abstractmethod
    def factor(self, alpha: Tensor, state: Mapping[str, Tensor]) -> Tensor:
        """The gates: the factor on the columns of each class, zero where alpha is zero, shape (classes,)."""

    @abstractmethod
    def read(self, sums: KernelSums, gate: Tensor, live: Tensor) -> Tensor:
        """What the method reads from the kernels, shape (classes,), zero for dead classes.

        Args:
            sums: gives sums over what each class's gate scales.
            gate: the gates folded into the kernels, shape (classes,).
            live: bool, shape (classes,).
        """

    def let_through(self, gate: Tensor, state: Mapping[str, Tensor]) -> Tensor:
        """The part of the optimizer's change to a column that takes effect, in [0, 1], shape (classes,).

        Args:
            gate: the gates folded into the kernels, shape (classes,).
            state: the method's own tensors.
        """
        return torch.ones_like(gate)

    @abstractmethod
    def propose(self, gates: Gates, reading: Tensor, step: Step) -> Proposal:
        """Where gates go in this step, and which classes may die in it."""

    def hold_open(self, alpha: Tensor, pressed: bool) -> Tensor:
        """Alpha of the classes that survive a step, kept away from zero.

        Args:
            alpha: shape (classes,).
            pressed: whether prices go on pushing gates towards zero.
        """
        return alpha

    def is_at_rest(self, step: int, schedule: Schedule) -> bool:
        """Whether gates no longer move after so many steps, if the targets are met."""
        return True
