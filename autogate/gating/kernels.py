"""The gated kernels: where they are at any moment, and values per class along their columns.

A gated side is the input dimension of a kernel: classes of channels lie along it. All gated sides of a model, laid end
to end, make one vector. One indexing takes a value per class to all columns, and one sum takes sums over columns back
to classes.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from itertools import accumulate, islice
from operator import is_
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from autogate.gating.columns import column_products, scale_columns, segment_sum
from autogate.gating.sharding import columns_here, has_shards, is_sharded, layout, local, part_like, total
from autogate.gating.sides import GatedSide, Stack, forms, stacked
from rewriters import ALWAYS, AutogateError, ChannelMap, Side


class Found(NamedTuple):
    """The gated kernels as they are in the model now.

    Attributes:
        at: the parameters in the places of gated sides.
        sides: the gated sides; of a kernel with several names only the first.
        kernels: each once.
    """

    at: list[nn.Parameter]
    sides: list[GatedSide]
    kernels: tuple[nn.Parameter, ...]


class _Stacked(NamedTuple):
    """Stacks of these gated sides, whose kernels had these forms."""

    of: list[GatedSide]
    forms: list[Any]
    stacks: list[Stack]


def parameter_sides(model: nn.Module, channel_map: ChannelMap) -> list[Side]:
    """The sides of a model's parameters that have classes."""
    names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return [side for side in channel_map.classes if side.tensor in names]


class GatedKernels:
    """The gated kernels of a model.

    Args:
        model: the model; it is not kept alive.
        channel_map: its classes of channels.
        scales_all: every parameter that has a class counts as a kernel, along each side with one, not only the kernels
            that sum over channels, along the sides that they read.
    """

    def __init__(self, model: nn.Module, channel_map: ChannelMap, scales_all: bool = False):
        self._size = channel_map.size
        sides = parameter_sides(model, channel_map) if scales_all else channel_map.gated
        self._sides = tuple(side for side in sides if side in channel_map.classes)
        classes = [channel_map.classes[side].cpu() for side in self._sides]
        self._lengths = tuple(len(labels) for labels in classes)
        self._begins = tuple(accumulate(self._lengths, initial=0))
        flat = torch.cat([torch.zeros(0, dtype=torch.int64), *classes])
        # Class number `size` stands for the pinned ones.
        self._labels = torch.where(flat == ALWAYS, channel_map.size, flat)
        # Weak, for a cycle would keep a deleted model's memory until the garbage collector comes by.
        self._model = weakref.ref(model)
        self.forget()

    def forget(self) -> None:
        """Drop all that was found out about the kernels."""
        self._homes: list[tuple[dict[str, Any], str]] | None = None
        self._sharded: dict[int, GatedSide] = {}
        self._kept: dict[int, Tensor] = {}
        self._found = Found([], [], ())
        self._stacked: _Stacked | None = None

    def __getstate__(self) -> dict[str, Any]:
        found: dict[str, Any] = {"_homes": None, "_sharded": {}, "_kept": {}, "_stacked": None}
        return {**self.__dict__, **found, "_found": Found([], [], ()), "_model": self._model()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._model = weakref.ref(state["_model"])

    def model(self) -> nn.Module | None:
        """The model, if it is still there."""
        return self._model()

    def find(self, device: torch.device) -> Found:
        """The gated kernels as they are now; the same value while they are the same parameters.

        Args:
            device: where values per class are from now on (fully_shard moves buffers by `tensor.data = ...`).

        Raises:
            AutogateError: a kernel is not a parameter of the model.
        """
        if self._labels.device != device and device.type != "meta":  # where they would lose their values
            self._labels, self._stacked = self._labels.to(device), None
        model = self._model()
        if model is None:
            return Found([], [], ())
        if self._homes is None:
            self._homes = self._locate(model)
        at = [home[name] for home, name in self._homes]
        if len(at) != len(self._found.at) or not all(map(is_, at, self._found.at)):
            found: dict[tuple[int, int], GatedSide] = {}
            for place, (weight, side) in enumerate(zip(at, self._sides, strict=True)):
                self._check_length(weight, side, self._lengths[place])
                gated = GatedSide(place, side.dim, weight, None)
                if self._sharded or is_sharded(weight):
                    gated = self._at_rest(gated)
                found.setdefault((id(gated.weight), side.dim), gated)
            kernels = {id(side.weight): side.weight for side in found.values()}
            self._found = Found(at, list(found.values()), tuple(kernels.values()))
        return self._found

    @staticmethod
    def _check_length(weight: nn.Parameter, side: Side, length: int) -> None:
        if weight.ndim <= side.dim or weight.shape[side.dim] != length:
            raise AutogateError(
                f"its shape is {tuple(weight.shape)} now. When the model was prepared, dimension {side.dim} had "
                f"{length} channels.",
                where=side.tensor,
                remedy="Change layers before prepare, or prepare the changed model again.",
            )

    def _stacks(self, sides: list[GatedSide]) -> list[Stack]:
        """The sides, in stacks of those that are alike."""
        if sides is not self._found.sides:  # copies that stand in for shards
            return stacked(sides, self._begins, self._labels)
        known, now = self._stacked, forms(self._found.kernels)
        if known is None or known.of is not sides or known.forms != now:
            known = self._stacked = _Stacked(sides, now, stacked(sides, self._begins, self._labels))
        return known.stacks

    def named(self, device: torch.device) -> dict[str, nn.Parameter]:
        """The gated kernels by name; of a kernel with several names the first."""
        return {self._sides[side.place].tensor: side.weight for side in self.find(device).sides}

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
        for place, (home, name) in enumerate(self._homes or () if self._sharded else ()):
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
        return torch.cat([values, values.new_full((1,), pinned)]).index_select(0, self._labels)

    def on_side(self, flat: Tensor, side: GatedSide) -> Tensor:
        """The part of `flat`, which is laid out along all sides, for the side's columns in this process."""
        values = flat[self._begins[side.place] : self._begins[side.place + 1]]
        return values if side.here is None else values[side.here.to(values.device)]

    def columns(self, chosen: Tensor, sides: list[GatedSide]) -> list[tuple[GatedSide, Tensor]]:
        """Sides with a column of the chosen classes in this process, and the indices of these columns, on the CPU."""
        if not sides:
            return []
        flat = torch.nonzero(self.spread(chosen, False)).flatten().cpu()
        bounds = torch.searchsorted(flat, torch.tensor(self._begins)).tolist()
        found = []
        for side in sides:
            first, last = bounds[side.place : side.place + 2]
            if first < last:
                index = flat[first:last] - self._begins[side.place]
                if side.here is not None:
                    index = torch.nonzero(torch.isin(side.here, index)).flatten()
                if len(index):
                    found.append((side, index))
        return found

    def scale(self, factors: Tensor, sides: list[GatedSide]) -> None:
        """Multiply the columns of each class by its factor, shape (classes,). Kernels whose factors are all 1 stay."""
        stacks, factors = self._stacks(sides), torch.cat([factors, factors.new_ones(1)])
        along = [factors.index_select(0, stack.labels.flatten()).view(stack.labels.shape) for stack in stacks]
        changed = iter(torch.cat([(own != 1).any(1) for own in along]).tolist() if along else ())
        for stack, own in zip(stacks, along, strict=True):
            chosen = [*islice(changed, len(stack.sides))]
            if (some := stack.only(chosen)) is not None:
                own = own if some is stack else own[torch.tensor(chosen, device=own.device)]
                scale_columns(some.here(), some.dim, own)

    def zero(self, columns: Tensor, side: GatedSide) -> None:
        """Make these columns of the side exactly zero."""
        weight = local(side.weight)
        weight.index_fill_(side.dim, columns.to(weight.device), 0)

    def keep(self, sides: list[GatedSide]) -> None:
        """Remember the kernels as they are."""
        weights = {id(side.weight): side for side in reversed(sides)}
        self._kept = {side.place: local(side.weight).detach().clone() for side in weights.values()}

    def as_kept(self, sides: list[GatedSide]) -> dict[int, Tensor]:
        """By place, the kernels as they were last kept; empty if they were not, because they are as they are."""
        if not self._kept:
            return {}
        first = {id(side.weight): side.place for side in reversed(sides)}
        kernels = {}
        for side in sides:
            weight = local(side.weight)
            kernel = self._kept.get(first[id(side.weight)], weight)
            # Of a model that was sharded since it was kept whole.
            kernels[side.place] = kernel if kernel.shape == weight.shape else part_like(kernel, side.weight)
        return kernels

    def products(
        self, sides: list[GatedSide], kernels: dict[int, Tensor], kind: torch.dtype, squares: bool = False
    ) -> Tensor:  # fmt: skip
        """<gradient, kernel> over the columns of each class, shape (classes + 1,); pinned columns come last.

        Args:
            sides: the gated sides.
            kernels: by place, the kernels that the gradients were taken at; empty if at those that are there now.
            kind: dtype to add in.
            squares: <kernel, kernel> instead.
        """
        # Kernels of one layout are summed together: one all-reduce a step, in which every process takes part.
        by_layout: dict[Any, Tensor] = {}
        for stack in self._stacks(sides):
            flat = by_layout.get(stack.layout)
            if flat is None:
                flat = by_layout[stack.layout] = torch.zeros(self._begins[-1], dtype=kind, device=self._labels.device)
            learns = stack if squares else stack.learning()
            if learns is not None:
                at = [kernels[side.place] for side in learns.sides] if kernels else learns.here()
                others = at if squares else learns.gradients()
                counted = column_products(others, at, stack.dim)
                flat.scatter_(0, learns.positions.flatten(), counted.to(flat).flatten())
        whole = torch.zeros(self._size + 1, dtype=kind, device=self._labels.device)
        for where, flat in by_layout.items():
            whole = whole + total(segment_sum(flat, self._labels, len(whole)), where)
        return whole
