"""Bring the kernels in line with the gates: what alpha says, the columns of the kernels are multiplied by."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from autogate.gating.kernels import GatedKernels, GatedSide
from autogate.methods import gate_value
from rewriters import AutogateError, ChannelMap, write_live

FOLD_TOLERANCE = 2**-10
"""A gate's change waits to be folded until it is larger than this part of the gate: it takes a pass over the
kernel, and many steps of training move a gate by less than a ten-thousandth."""


class Foldable(NamedTuple):
    """The buffers of a bank that folding reads, and writes to."""

    alpha: Tensor
    folded: Tensor
    dead: Tensor
    epsilon: Tensor


class Folding:
    """Keeps the kernels in line with the gates.

    Args:
        kernels: the gated kernels.
        channel_map: where the classes lie.
        start: the gates that the kernels hold now.
        keeps: the kernels are remembered as they were folded: nobody measures before the optimizer moves them.
    """

    def __init__(self, kernels: GatedKernels, channel_map: ChannelMap, start: Foldable, keeps: bool):
        self._kernels = kernels
        self._channel_map = channel_map
        self._keeps = keeps
        self._left = start.folded.clone(), start.epsilon.clone()
        self.forget()

    def forget(self) -> None:
        """Drops all that was noted of earlier folding."""
        self._written_at: tuple[Any, ...] | None = None
        self._folded_at: tuple[Any, ...] | None = None
        self._dead_columns: tuple[Any, list[Tensor]] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_written_at": None, "_folded_at": None, "_dead_columns": None}

    def knows(self, alpha: Tensor) -> bool:
        """Whether nobody has written to alpha since it was folded."""
        return self._folded_at is not None and self._folded_at[0] == version_of(alpha)

    def wanted(self, gates: Foldable) -> bool:
        """Whether the next forward needs the kernels folded."""
        gated = self._sides(gates)
        # functional_call and its kin run the model on tensors that stand in for its parameters.
        if self._versions(gates, gated) == self._folded_at or not all(
            isinstance(side.weight, nn.Parameter) for side in gated
        ):
            return False
        if not self._kernels.may_stand_in(gated):
            return True
        if self._keeps:
            self._kernels.keep(gated)
        return False

    def fold(self, gates: Foldable, stepped: bool = False) -> None:
        """As `GateBank.fold`, which has the contract."""
        gated = self._sides(gates)
        versions = self._versions(gates, gated)
        if versions == self._folded_at and not stepped:
            return
        if self._folded_at is None or versions[: len(gates)] != self._folded_at[: len(gates)]:
            self._fold(gates, gated, stepped)
        self._zero_dead(gates.dead, gated)
        self._folded_at = self._versions(gates, gated)
        self.write_live(gates.dead)
        if self._keeps:
            self._kernels.keep(gated)

    def _fold(self, gates: Foldable, gated: list[GatedSide], stepped: bool) -> None:
        """What the gates have come to since the last time: deaths are noted, columns scaled."""
        alpha, folded, epsilon = gates.alpha, gates.folded, gates.epsilon
        own = stepped or self._left_as(folded, epsilon)
        gate = gate_value(alpha, epsilon)
        live = (gates.dead == 0) & (gate != 0)
        ratio = gate / folded
        ratio = torch.where(live & ((ratio - 1).abs() > _tolerance(gated)), ratio, 1.0)
        ratio = torch.where(live, ratio, 0.0)
        moved = (ratio != 1) & (folded != 0)
        scaled, died = self._where_to_scale(gates, moved, live)
        if died:
            gates.dead.masked_fill_(~live, 1.0)
        if scaled or died or self._folded_at is None:
            alpha.masked_fill_(~live, 0.0)
            folded.copy_(torch.where(moved, gate, folded).masked_fill_(~live, 0.0))
        elif not self.knows(alpha):
            alpha.masked_fill_(~live, 0.0)
        if own and scaled:
            factor = self._kernels.spread(ratio, 1.0)
            for side in [*gated, *self._kernels.stand_ins()]:
                if side.place in scaled:
                    self._kernels.scale(factor, side)
        self._left = folded.clone(), epsilon.clone()

    def _zero_dead(self, dead: Tensor, gated: list[GatedSide]) -> None:
        """Dead columns are exactly zero, whatever has moved them."""
        stand_ins = self._kernels.stand_ins()
        columns = [*self._dead(dead, gated), *self._kernels.columns(dead > 0, stand_ins)]
        for side, of_side in zip([*gated, *stand_ins], columns, strict=True):
            self._kernels.zero(of_side, side)

    def write_live(self, dead: Tensor) -> None:
        """Lets norms across channels look at the live ones, where a class has died since the last time."""
        model, version = self._kernels.model(), (version_of(dead), id(dead))
        if model is not None and self._channel_map.statistics and self._written_at != version:
            write_live(model, self._channel_map, dead == 0)
            self._written_at = version

    def _left_as(self, *values: Tensor) -> bool:
        """Whether `folded` and `epsilon` are as folding left them, so that whoever wrote to alpha meant it."""
        return all(torch.equal(value, left.to(value.device)) for value, left in zip(values, self._left, strict=True))

    def _sides(self, gates: Foldable) -> list[GatedSide]:
        return self._kernels.sides(gates.alpha.device)

    def _versions(self, gates: Foldable, gated: list[GatedSide]) -> tuple[Any, ...]:
        """Changes whenever a tensor that folding depends on has been written to or replaced; alpha's comes first."""
        return (*map(version_of, gates), *((id(side.weight), version_of(side.weight)) for side in gated))

    def _where_to_scale(self, gates: Foldable, moved: Tensor, live: Tensor) -> tuple[set[int], bool]:
        """Sides with a column whose gate moved, and whether a class died: all that the host must know."""
        counts = self._kernels.count(moved)
        before = gates.dead == 0
        died = (before & ~live).any()
        broken = before & ~torch.isfinite(gates.alpha)
        *columns, some_died, some_broke = torch.cat([counts, torch.stack([died, broken.any()]).to(counts)]).tolist()
        if some_broke:
            classes = torch.nonzero(broken).flatten().tolist()
            raise AutogateError(
                f"alpha of {len(classes)} classes is not finite.",
                where=self._channel_map.describe(classes),
                remedy="Go back to the latest checkpoint in which it is.",
            )
        return {place for place, count in enumerate(columns) if count}, bool(some_died)

    def _dead(self, dead: Tensor, gated: list[GatedSide]) -> list[Tensor]:
        """Indices of the dead columns of each gated side, among those that lie here."""
        version = version_of(dead), id(dead), *(id(side.weight) for side in gated)
        if self._dead_columns is None or self._dead_columns[0] != version:
            columns = [index.to(dead.device) for index in self._kernels.columns(dead > 0, gated)]
            self._dead_columns = (version, columns)
        return self._dead_columns[1]


def version_of(tensor: Tensor) -> int:
    """Changes whenever the tensor is written to."""
    return -1 if tensor.is_inference() else tensor._version


def _tolerance(gated: list[GatedSide]) -> float:
    """Half-precision kernels would round smaller changes than twice their resolution away."""
    types = {side.weight.dtype for side in gated}
    return max([FOLD_TOLERANCE, *(2 * torch.finfo(dtype).eps for dtype in types)])
