"""A gate bank's part of an optimizer step: readings before it, the gates' step after it.

Before the optimizer moves the kernels, the method reads what it needs from them and their gradients. After it, the
learner moves the gates, and folding brings the kernels in line.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from autogate.gating.columns import all_finite
from autogate.gating.folding import Folding
from autogate.gating.held_back import HeldBack, hold_back
from autogate.gating.kernels import GatedKernels
from autogate.gating.sides import GatedSide
from autogate.gating.state import BankState, Counters, version_of
from autogate.methods import KernelSums, Learner, Standing


@dataclass(frozen=True)
class Measurement:
    """What was read before the optimizer's step: the method's reading (None until it is there), columns to hold
    back."""

    reading: Tensor | None
    held: tuple[HeldBack, ...]


@dataclass(frozen=True)
class _Sums:
    """Sums over kernel columns, for the method to read (`autogate.methods.KernelSums`)."""

    kernels: GatedKernels
    sides: list[GatedSide]
    at: dict[int, Tensor]
    """By place, the kernels that the gradients were taken at; empty if at those that are there now."""
    kind: torch.dtype
    scale: Tensor | float | None

    def gradient_products(self) -> Tensor:
        total = self.kernels.products(self.sides, self.at, self.kind)
        if self.scale is not None:
            total = total / self.scale
        return torch.where(all_finite(total), total[:-1], torch.nan)

    def squares(self) -> Tensor:
        return self.kernels.products(self.sides, self.at, self.kind, squares=True)[:-1]


class Stepping:
    """Measures and steps the gates of a bank. All that lasts is in the bank's buffers; here are caches.

    Args:
        kernels: the gated kernels.
        folding: brings them in line with the gates.
        learner: the mathematics of a step.
    """

    def __init__(self, kernels: GatedKernels, folding: Folding, learner: Learner):
        self._kernels = kernels
        self._folding = folding
        self.learner = learner
        self.forget()

    def forget(self) -> None:
        """Drop what was measured, and all that was worked out from buffers."""
        self.pending: Measurement | None = None
        self._standing: tuple[Any, Standing] | None = None
        self._counters: tuple[Any, Counters] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "pending": None, "_standing": None, "_counters": None}

    def measure(self, state: BankState, scale: Tensor | float | None = None, later: bool = False) -> None:
        """As `GateBank.measure`, which has the contract."""
        self.pending = None
        sides = self._sides(state)
        kernels = self._kernels.as_kept(sides)
        if not self._folding.knows(state.alpha):
            self._folding.fold(state)  # alphas set by hand, before they enter the mathematics
        if self.is_over(state):
            return
        after = self.learner.method.reads_after
        reading = None if later or after else self._read(state, sides, kernels, scale)
        part = self.learner.method.let_through(state.folded, state.method)
        held = hold_back(self._kernels, state.live & (part < 1), part, sides, kernels)
        self.pending = Measurement(reading, held)

    def read(self, state: BankState) -> None:
        """As `GateBank.read`."""
        if self.pending is not None and not self.learner.method.reads_after:
            self.pending = replace(self.pending, reading=self._read_now(state))

    def step(self, state: BankState, lr: float) -> bool | None:
        """As `GateBank.step`, without the folding. Tells whether the reading was finite, None if gates stand still."""
        if self.pending is None:
            self.measure(state)
        measured, self.pending = self.pending, None
        if measured is None:
            if lr:
                self._count(state)
            return None
        for columns in measured.held:
            columns.release()
        reading = self._read_now(state) if measured.reading is None else measured.reading
        finite = bool(all_finite(reading))
        if finite and (lr or (not self.learner.method.reads_after and reading.any())):
            after = self.learner.step(state.gates(self.counters(state)), reading, lr, self.standing(state))
            self._note(state, state.write(after))
        return finite

    def _count(self, state: BankState) -> None:
        """A step in which no gate learns: it counts while the run lasts."""
        counters = self.counters(state)
        if counters.steps < self.learner.schedule.steps:
            state.step_count.fill_(counters.steps + 1)
            state.balance.zero_()
            self._note(state, counters._replace(steps=counters.steps + 1))

    def _read(
        self, state: BankState, sides: list[GatedSide], at: dict[int, Tensor], scale: Tensor | float | None = None
    ) -> Tensor:
        """The method's reading, of gradients that were taken at these kernels."""
        sums = _Sums(self._kernels, sides, at, state.alpha.dtype, scale)
        return self._reading(state, sums)

    def _read_now(self, state: BankState) -> Tensor:
        """The method's reading, of gradients that were taken at the kernels as they are."""
        return self._reading(state, self.sums(state))

    def _reading(self, state: BankState, sums: KernelSums) -> Tensor:
        return self.learner.method.read(sums, state.folded, state.live)

    def sums(self, state: BankState) -> KernelSums:
        """Sums over the columns of the kernels as they are, and over their gradients."""
        return _Sums(self._kernels, self._sides(state), {}, state.alpha.dtype, scale=None)

    def _sides(self, state: BankState) -> list[GatedSide]:
        return self._kernels.find(state.alpha.device).sides

    def is_over(self, state: BankState) -> bool:
        """Whether gates no longer move: see `Learner.is_over`."""
        counters = self.counters(state)
        return self.learner.is_over(counters.steps, counters.settled)

    def standing(self, state: BankState) -> Standing:
        """Where the model is with the classes that live now."""
        version = version_of(state.dead), id(state.dead)
        if self._standing is None or self._standing[0] != version:
            self._standing = (version, self.learner.standing(state.live))
        return self._standing[1]

    def counters(self, state: BankState) -> Counters:
        """The course of the run so far, read from the device only if it has changed."""
        version = state.counters_version()
        if self._counters is None or self._counters[0] != version:
            self._counters = (version, state.counters())
        return self._counters[1]

    def _note(self, state: BankState, counters: Counters) -> None:
        self._counters = (state.counters_version(), counters)
