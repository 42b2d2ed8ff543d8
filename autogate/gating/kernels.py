"""The gated kernels: where they are at any moment, and values per class along their columns.

A gated side is the input dimension of a kernel: classes of channels lie along it. All gated sides of a model, laid end
to end, make one vector. One indexing takes a value per class to all columns, and one sum takes sums over columns back
to classes.
"""

from __future__ import annotations

import weakref
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from autogate.gating.columns import along, column_products, scale_columns, segment_sum
from autogate.gating.sharding import columns_here, has_shards, is_sharded, layout, local, part_like, total
from rewriters import ALWAYS, AutogateError, ChannelMap


class GatedSide(NamedTuple):
    """A gated side: its place among all, its dimension, the kernel, its columns in this process (None: all)."""

    place: int
    dim: int
    weight: nn.Parameter
    here: Tensor | None


@dataclass(frozen=True)
class HeldBack:
    """Columns as they were before an optimizer's step, and the part of the step that takes effect."""

    weight: nn.Parameter
    dim: int
    index: Tensor
    before: Tensor
    part: Tensor


class GatedKernels:
    """The gated kernels of a model.

    Args:
        model: the model; it is not kept alive.
        channel_map: its classes of channels.
    """

    def __init__(self, model: nn.Module, channel_map: ChannelMap):
        self._size = channel_map.size
        self._sides = tuple(side for side in channel_map.gated if side in channel_map.classes)
        classes = [channel_map.classes[side].cpu() for side in self._sides]
        self._lengths = tuple(len(labels) for labels in classes)
        self._begins = tuple(accumulate(self._lengths, initial=0))
        flat = torch.cat([torch.zeros(0, dtype=torch.int64), *classes])
        # Class number `size` stands for the pinned ones.
        self._labels = torch.where(flat == ALWAYS, channel_map.size, flat)
        self._side_of = torch.repeat_interleave(torch.tensor(self._lengths, dtype=torch.int64))
        # Weak, for a cycle would keep a deleted model's memory until the garbage collector comes by.
        self._model = weakref.ref(model)
        self.forget()

    def forget(self) -> None:
        """Drop all that was found out about the kernels."""
        self._homes: list[tuple[dict[str, Any], str]] | None = None
        self._sharded: dict[int, GatedSide] = {}
        self._kept: dict[int, Tensor] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_homes": None, "_sharded": {}, "_kept": {}, "_model": self._model()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._model = weakref.ref(state["_model"])

    def model(self) -> nn.Module | None:
        """The model, if it is still there."""
        return self._model()

    def sides(self, device: torch.device) -> list[GatedSide]:
        """The gated sides; of a kernel with several names only the first.

        Args:
            device: where values per class are from now on (fully_shard moves buffers by `tensor.data = ...`).

        Raises:
            AutogateError: a kernel is not a parameter of the model.
        """
        if self._labels.device != device:
            self._labels, self._side_of = self._labels.to(device), self._side_of.to(device)
        model = self._model()
        if model is None:
            return []
        if self._homes is None:
            self._homes = self._locate(model)
        found: dict[tuple[int, int], GatedSide] = {}
        for place, ((home, name), side) in enumerate(zip(self._homes, self._sides, strict=True)):
            gated = GatedSide(place, side.dim, home[name], None)
            if gated.weight.ndim <= side.dim or gated.weight.shape[side.dim] != self._lengths[place]:
                raise AutogateError(
                    f"its shape is {tuple(gated.weight.shape)} now. When the model was prepared, dimension {side.dim} "
                    f"had {self._lengths[place]} channels.",
                    where=side.tensor,
                    remedy="Change layers before prepare, or prepare the changed model again.",
                )
            if self._sharded or is_sharded(gated.weight):
                gated = self._at_rest(gated)
            found.setdefault((id(gated.weight), side.dim), gated)
        return list(found.values())

    def named(self, device: torch.device) -> dict[str, nn.Parameter]:
        """The gated kernels by name; of a kernel with several names the first."""
        return {self._sides[side.place].tensor: side.weight for side in self.sides(device)}

    def parameters(self) -> list[nn.Parameter]:
        """All parameters of the model, gated or not."""
        model = self._model()
        return [] if model is None else list(model.parameters())

    def learning(self, names: Iterable[str]) -> list[tuple[str, nn.Parameter]]:
        """Those of the model's parameters with these names that learn."""
        model = self._model()
        named = [] if model is None else [(name, model.get_parameter(name)) for name in sorted(names)]
        return [(name, weight) for name, weight in named if weight.requires_grad]

    def _locate(self, model: nn.Module) -> list[tuple[dict[str, Any], str]]:
        """The kernel of each gated side, by the dictionary of its module and its name there.

        This is looked up once, not at every forward: the parameter may be replaced, its module may not.
        """
        homes = []
        for side in self._sides:
            path, _, name = side.tensor.rpartition(".")
            try:
                home = model.get_submodule(path)._parameters
            except AttributeError:
                home = {}
            if home.get(name) is None:
                raise AutogateError("this gated kernel is not a parameter of the model.", where=side.tensor)
            homes.append((home, name))
        return homes

    def _at_rest(self, gated: GatedSide) -> GatedSide:
        """A gated side with the parameter that optimizers step, instead of what its module has now.

        From forward to backward, FSDP2 puts gathered copies (or shards over fewer processes) into the module.
        """
        known = self._sharded.get(gated.place)
        if known is not None and (gated.weight is known.weight or layout(gated.weight) != layout(known.weight)):
            return known
        if is_sharded(gated.weight):
            gated = self._sharded[gated.place] = gated._replace(here=columns_here(gated.weight, gated.dim))
        return gated

    def stand_ins(self) -> list[GatedSide]:
        """Gated sides of the copies that stand in for sharded parameters now."""
        found: dict[tuple[int, int], GatedSide] = {}
        for place, (home, name) in enumerate(self._homes or ()):
            known = self._sharded.get(place)
            if known is not None and (weight := home[name]) is not known.weight:
                found.setdefault(
                    (id(weight), known.dim), known._replace(weight=weight, here=columns_here(weight, known.dim))
                )
        return list(found.values())

    def may_stand_in(self, sides: list[GatedSide]) -> bool:
        """Whether one may be FSDP2's gathered copy of a sharded kernel that was not seen yet, in the first forward."""
        model = self._model()
        return model is not None and any(not is_sharded(side.weight) for side in sides) and has_shards(model)

    def spread(self, values: Tensor, pinned: float | bool) -> Tensor:
        """A value per class, laid out along all gated sides; `pinned` for columns without a class."""
        return torch.cat([values, values.new_full((1,), pinned)])[self._labels]

    def on_side(self, flat: Tensor, side: GatedSide) -> Tensor:
        """The part of `flat`, which is laid out along all sides, for the side's columns in this process."""
        values = flat[self._begins[side.place] : self._begins[side.place + 1]]
        return values if side.here is None else values[side.here.to(values.device)]

    def count(self, chosen: Tensor) -> Tensor:
        """How many columns the chosen classes (bool, shape (classes,)) have on each side, float32, shape (sides,)."""
        counts = torch.zeros(len(self._sides), device=chosen.device)
        return counts.index_add_(0, self._side_of, self.spread(chosen, False).to(counts.dtype))

    def columns(self, chosen: Tensor, sides: list[GatedSide]) -> list[Tensor]:
        """Indices of the columns of each side that the chosen classes have in this process, on the CPU."""
        if not sides:
            return []
        flat = self.spread(chosen, False).cpu()
        return [torch.nonzero(self.on_side(flat, side)).flatten() for side in sides]

    def scale(self, factor: Tensor, side: GatedSide) -> None:
        """Multiply the side's columns by factors laid out along all sides."""
        scale_columns(local(side.weight), side.dim, self.on_side(factor, side))

    def zero(self, columns: Tensor, side: GatedSide) -> None:
        """Make these columns of the side exactly zero."""
        if len(columns):
            weight = local(side.weight)
            weight.index_fill_(side.dim, columns.to(weight.device), 0)

    def keep(self, sides: list[GatedSide]) -> None:
        """Remember the kernels as they are."""
        weights = {id(side.weight): side for side in reversed(sides)}
        self._kept = {side.place: local(side.weight).detach().clone() for side in weights.values()}

    def as_kept(self, sides: list[GatedSide]) -> dict[int, Tensor]:
        """By place, the kernels as they were last kept; as they are, if they were not."""
        first = {id(side.weight): side.place for side in reversed(sides)}
        kernels = {}
        for side in sides:
            weight = local(side.weight)
            kernel = self._kept.get(first[id(side.weight)], weight)
            # Of a model that was sharded since it was kept whole.
            kernels[side.place] = kernel if kernel.shape == weight.shape else part_like(kernel, side.weight)
        return kernels

    def products(self, sides: list[GatedSide], kernels: dict[int, Tensor], kind: torch.dtype) -> Tensor:
        """<gradient, kernel> over the columns of each class, shape (classes + 1,); pinned columns come last.

        Args:
            sides: the gated sides.
            kernels: by place, the kernels that the gradients were taken at.
            kind: dtype to add in.
        """
        # Kernels of one layout are summed together: one all-reduce a step, in which every process takes part.
        by_layout: dict[Any, dict[int, Tensor]] = {}
        for side in sides:
            sums = by_layout.setdefault(layout(side.weight), {})
            if (grad := side.weight.grad) is not None:
                counted = column_products(local(grad), kernels[side.place], side.dim)
                sums[side.place] = self._laid_out(counted.to(self._labels.device, kind), side)
        whole = torch.zeros(self._size + 1, dtype=kind, device=self._labels.device)
        for where, sums in by_layout.items():
            flat = torch.cat([whole[:0], *sums.values()])
            whole = whole + total(segment_sum(flat, self._labels_of(sums), len(whole)), where)
        return whole

    def _laid_out(self, values: Tensor, side: GatedSide) -> Tensor:
        """Values of the side's columns in this process, zeros in the places of its other columns."""
        if side.here is None:
            return values
        whole = values.new_zeros(self._lengths[side.place])
        return whole.index_copy(0, side.here.to(values.device), values)

    def _labels_of(self, places: Collection[int]) -> Tensor:
        """The labels along these sides, laid end to end."""
        if len(places) == len(self._sides):
            return self._labels
        ends = [self._labels[self._begins[place] : self._begins[place + 1]] for place in places]
        return torch.cat([self._labels[:0], *ends])

    def hold_back(
        self, chosen: Tensor, part: Tensor, sides: list[GatedSide], kernels: dict[int, Tensor]
    ) -> tuple[HeldBack, ...]:
        """Note the columns of the chosen classes, so that `release` lets only a part of their change take effect.

        Args:
            chosen: bool, shape (classes,).
            part: in [0, 1], shape (classes,).
            sides: the gated sides.
            kernels: by place, the kernels as they were before.
        """
        if not chosen.any():
            return ()
        part = self.spread(part, 1.0)
        held = []
        for side, index in zip(sides, self.columns(chosen, sides), strict=True):
            if len(index):
                before = kernels[side.place]
                through = self.on_side(part, side)[index.to(part.device)].to(before)
                index = index.to(before.device)
                held.append(HeldBack(side.weight, side.dim, index, before.index_select(side.dim, index), through))
        return tuple(held)

    @staticmethod
    def release(held: tuple[HeldBack, ...]) -> None:
        """Let only a part of the change of the held columns take effect."""
        for columns in held:
            weight = local(columns.weight)
            after = weight.index_select(columns.dim, columns.index)
            part = along(columns.part, columns.dim, weight.ndim)
            weight.index_copy_(columns.dim, columns.index, torch.lerp(columns.before, after, part))
