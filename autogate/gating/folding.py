"""Bring the kernels in line with the gates: a kernel's columns are multiplied by what their gates have changed."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from autogate.gating.columns import all_finite
from autogate.gating.kernels import Found, GatedKernels
from autogate.gating.sides import GatedSide
from autogate.gating.state import BankState, version_of, versions_of
from autogate.methods import Method
from rewriters import AutogateError, ChannelMap, write_live

FOLD_TOLERANCE = 2**-10
"""A gate's change waits to be folded until it is larger than this part of the gate. Folding takes a pass over the
kernel, and many steps of training move a gate by less than a ten-thousandth."""


class Folding:
    """Keeps the kernels in line with the gates.

    Args:
        kernels: the gated kernels.
        channel_map: which channels each class has.
        method: tells the factor of each gate.
        start: the bank's buffers; its gates are the ones that the kernels hold now.
        keeps: remember the kernels as they were folded, because nobody measures before the optimizer moves them.
    """

    def __init__(
        self, kernels: GatedKernels, channel_map: ChannelMap, method: Method, start: BankState, keeps: bool
    ):  # fmt: skip
        self._kernels = kernels
        self._channel_map = channel_map
        self._method = method
        self._keeps = keeps
        self._left = tuple(value.clone() for value in self._own(start))
        self.forget()

    def forget(self) -> None:
        """Drop all that was noted of earlier folding."""
        self._written_at: tuple[Any, ...] | None = None
        self._folded_at: tuple[Any, ...] | None = None
        self._dead_columns: tuple[Any, list[tuple[GatedSide, Tensor]]] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_written_at": None, "_folded_at": None, "_dead_columns": None}

    def knows(self, alpha: Tensor) -> bool:
        """Whether nobody has written to alpha since it was folded."""
        return self._folded_at is not None and self._folded_at[0] == version_of(alpha)

    def wanted(self, state: BankState) -> bool:
        """Whether the next forward needs the kernels folded."""
        # functional_call and its kin run the model on tensors that stand in for its parameters.
        gated = self._kernels.find(state.alpha.device)
        if self._versions(state, gated) == self._folded_at or not all(
            isinstance(kernel, nn.Parameter) for kernel in gated.kernels
        ):
            return False
        if not self._kernels.may_stand_in(gated.sides):
            return True
        if self._keeps:
            self._kernels.keep(gated.sides)
        return False

    def fold(self, state: BankState, stepped: bool = False) -> None:
        """As `GateBank.fold`, which has the contract."""
        gated = self._kernels.find(state.alpha.device)
        versions = self._versions(state, gated)
        if versions == self._folded_at and not stepped:
            return
        own = len(self._read(state))
        if self._folded_at is None or versions[:own] != self._folded_at[:own]:
            self._fold(state, gated, stepped)
        self._zero_dead(state.dead, gated)
        self._folded_at = self._versions(state, gated)
        self.write_live(state.dead)
        if self._keeps:
            self._kernels.keep(gated.sides)

    def _fold(self, state: BankState, gated: Found, stepped: bool) -> None:
        """Take in how gates have changed since the last time: note deaths, scale columns."""
        alpha, folded = state.alpha, state.folded
        meant = stepped or self._left_as(state)
        gate, was_live = self._method.factor(alpha, state.method), state.live
        live = was_live & (gate != 0)
        ratio = gate / folded
        ratio = torch.where(live & ((ratio - 1).abs() > _tolerance(gated.kernels)), ratio, 1.0)
        ratio = torch.where(live, ratio, 0.0)
        moved = (ratio != 1) & (folded != 0)
        scaled, died, finite = torch.stack([moved.any(), (was_live & ~live).any(), all_finite(alpha)]).tolist()
        if not finite:
            self._check_finite(alpha, was_live)
        if died:
            state.dead.add_((was_live & ~live) * (state.dead.max() + 1))  # of later deaths it is larger
        if scaled or died or self._folded_at is None:
            alpha.masked_fill_(~live, 0.0)
            folded.copy_(torch.where(moved, gate, folded).masked_fill_(~live, 0.0))
        elif not self.knows(alpha):
            alpha.masked_fill_(~live, 0.0)
        if meant and scaled:
            for sides in (gated.sides, self._kernels.stand_ins()):
                self._kernels.scale(ratio, sides)
        self._left = tuple(value.clone() for value in self._own(state))

    def _zero_dead(self, dead: Tensor, gated: Found) -> None:
        """Make dead columns exactly zero, whatever has moved them."""
        stand_ins = self._kernels.stand_ins()
        for side, columns in (*self._dead(dead, gated), *self._kernels.columns(dead > 0, stand_ins)):
            self._kernels.zero(columns, side)

    def write_live(self, dead: Tensor) -> None:
        """Let cross-channel statistics look at the live channels, if a class has died since the last time."""
        model, version = self._kernels.model(), (version_of(dead), id(dead))
        if model is not None and self._channel_map.statistics and self._written_at != version:
            write_live(model, self._channel_map, dead == 0)
            self._written_at = version

    def _own(self, state: BankState) -> tuple[Tensor, ...]:
        """What folding or the method writes, apart from alpha, and gates depend on."""
        return state.folded, *(state.method[name] for name in self._method.gate_state)

    def _read(self, state: BankState) -> tuple[Tensor, ...]:
        """All buffers that folding depends on; alpha comes first."""
        return state.alpha, *self._own(state), state.dead

    def _left_as(self, state: BankState) -> bool:
        """Whether only alpha was written to since the last folding, so that whoever wrote to it meant it."""
        pairs = list(zip(self._own(state), self._left, strict=True))
        if any(left.is_meta for _, left in pairs):  # they had no values
            return False
        return all(torch.equal(value, left.to(value.device)) for value, left in pairs)

    def _versions(self, state: BankState, gated: Found) -> tuple[Any, ...]:
        """Changes whenever a tensor that folding depends on is written to or replaced; alpha's version comes first."""
        return (*map(version_of, self._read(state)), [*map(id, gated.kernels)], versions_of(gated.kernels))

    def _check_finite(self, alpha: Tensor, live: Tensor) -> None:
        """Raise if the alpha of a live class is not finite."""
        broken = torch.nonzero(live & ~torch.isfinite(alpha)).flatten().tolist()
        if broken:
            raise AutogateError(
                f"alpha of {len(broken)} classes is not finite.",
                where=self._channel_map.describe(broken),
                remedy="Go back to the latest checkpoint in which it is.",
            )

    def _dead(self, dead: Tensor, gated: Found) -> list[tuple[GatedSide, Tensor]]:
        """The gated sides with dead columns in this process, and the indices of these."""
        version = version_of(dead), id(dead), [*map(id, gated.kernels)]
        if self._dead_columns is None or self._dead_columns[0] != version:
            columns = [(side, index.to(dead.device)) for side, index in self._kernels.columns(dead > 0, gated.sides)]
            self._dead_columns = (version, columns)
        return self._dead_columns[1]


def _tolerance(kernels: Iterable[nn.Parameter]) -> float:
    """Half-precision kernels would round smaller changes than twice their resolution away."""
    types = {kernel.dtype for kernel in kernels}
    return max([FOLD_TOLERANCE, *(2 * torch.finfo(dtype).eps for dtype in types)])
