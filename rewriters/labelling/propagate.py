"""The label pass: run a captured graph once on labels, and read the channel map off what was merged."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from rewriters.labelling.channel_map import ALWAYS, ChannelMap, Kernel, Pin, Side
from rewriters.labelling.labels import Labelled, LabelSpace, give_members, picked
from rewriters.labelling.rules import PRODUCTS, Crossing, Findings, KernelCall, Look, OpCall, find_rule
from rewriters.recording import Capture, is_getitem, tensors_of


@dataclass
class Labelling:
    """Labels of every value of one or more captured graphs.

    Attributes:
        space: the labels.
        findings: kernels, gates and grids that the rules noted.
        values: labels of each node's result (a list where it has several).
        looks: statistics that a node takes along channels.
    """

    space: LabelSpace = field(default_factory=LabelSpace)
    findings: Findings = field(default_factory=Findings)
    values: dict[fx.Node, Any] = field(default_factory=dict)
    looks: dict[fx.Node, list[Look]] = field(default_factory=dict)
    _numbered: tuple[np.ndarray, tuple[int, int], np.ndarray] | None = field(default=None, init=False, repr=False)

    def run(self, captured: Capture, counted: bool = True) -> None:
        """Label every node of a captured model, whose outputs keep all their channels.

        Where the run is not `counted` (train mode's, beside eval mode's), its kernels cost nothing.
        """
        first = len(self.findings.kernels)
        for node in captured.graph.nodes:
            if node.op == "get_attr":
                self.values[node] = self._tensor(node, captured)
            elif node.op == "placeholder":
                self.values[node] = Labelled.unknown(node.meta["val"])
            elif node.op == "call_function":
                self.values[node] = self.call(node)
            else:
                self._pin_outputs(node)
        if not counted:
            self.findings.kernels[first:] = [
                KernelCall(replace(call.kernel, macs=0.0, outputs=0.0)) for call in self.findings.kernels[first:]
            ]

    def _tensor(self, node: fx.Node, captured: Capture) -> Labelled:
        value = node.meta["val"]
        owned = node.target in captured.tensors and value.is_floating_point()
        if not owned:
            return Labelled.unknown(value)
        if not isinstance(value, nn.Parameter):
            self.findings.buffers.add(node.target)
        return self.space.own(node.target, value.shape)

    def _pin_outputs(self, node: fx.Node) -> None:
        for source in node.all_input_nodes:
            for layer in self.values[source].layers:
                self.space.pin(layer, "", "output", "the model returns it")

    def call(self, node: fx.Node) -> Any:
        """Labels of one recorded call's results, from those of its arguments."""
        if is_getitem(node):
            source, index = node.args
            return self.values[source][index]
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), self.values.__getitem__)
        owner = node.meta["call"]
        path = owner.path if owner is not None else ""
        before = len(self.findings.looks)
        result = self.apply(node.target, args, kwargs, node.meta["val"], path, self.findings, _unused(node))
        if len(self.findings.looks) > before:
            self.looks[node] = self.findings.looks[before:]
        return result

    def apply(
        self, op: Any, args: Any, kwargs: Any, value: Any, path: str, findings: Findings,
        unused: frozenset[int] = frozenset(),
    ) -> Any:  # fmt: skip
        """Labels of `value`, the result of `op` on arguments whose tensors are given as `Labelled`.

        Where there are several results, `unused` are the places of those that nothing is computed from.
        """
        given = tensors_of(value)
        shapes = [tuple(tensor.shape) for tensor in given]
        result = find_rule(op)(OpCall(op, args, kwargs, shapes, path, self.space, findings, unused))
        results = result if isinstance(result, list) else [result]
        results = [
            replace(labels, boolean=True) if tensor.dtype is torch.bool else labels
            for tensor, labels in zip(given, results, strict=True)
        ]
        if isinstance(value, Tensor):
            return results[0]
        rest = iter(results)
        return [next(rest) if isinstance(item, Tensor) else None for item in value]

    def kernels_of(self, node: fx.Node) -> set[str]:
        """Names of the parameters that a recorded convolution or matrix product is with; empty for other calls."""
        if node.op != "call_function" or is_getitem(node) or find_rule(node.target) not in PRODUCTS:
            return set()
        values = (self.values[source] for source in node.all_input_nodes)
        return {value.source for value in values if isinstance(value, Labelled) and value.source is not None}

    def by_tensor(self) -> dict[int, Labelled]:
        """Labels by the id of the fake tensor that carries them."""
        tensors = ((node.meta.get("val"), labels) for node, labels in self.values.items())
        return {id(value): labels for value, labels in tensors if isinstance(value, Tensor)}

    def fork(self) -> Labelling:
        """The same labels, to be carried on without a trace in this labelling."""
        return Labelling(self.space.fork(), self.findings.copy(), dict(self.values), dict(self.looks))

    def extends(self, other: Labelling) -> bool:
        """Whether all labels of `other`, which this was forked from, are in the classes they were in."""
        return bool(np.array_equal(self.numbering()[: other.space.count], other.numbering()))

    def merge_values(self, first: Labelled | None, second: Labelled | None, path: str) -> None:
        """Let the channels of two values go alike; where only one has channels that may go, they stay."""
        known = [value for value in (first, second) if value is not None]
        shared = len(known) == 2 and known[0].ndim == known[1].ndim
        for value, other in (known, reversed(known)) if shared else ():
            for layer in value.layers:
                partners = [theirs for theirs in other.layers if theirs.shape == layer.shape]
                if partners:
                    self.space.merge(layer, partners[0])
                else:
                    self.space.pin(layer, path, "forward", "called in several ways")
        if not shared:
            for layer in (layer for value in known for layer in value.layers):
                self.space.pin(layer, path, "forward", "called in several ways")

    def _settle_crossings(self) -> None:
        """Let labels that vary along more dimensions than those they met go with these, one for one.

        Where they are alike along the shared dimensions by now (the places in a head, for whole heads go), none
        of them could: what they met stays instead, a table of positions, say.
        """
        unlike = []
        for crossing in self.findings.crossings:
            if self._alike(crossing):
                reason = "one for each place in a head, and whole heads die"
                self.space.pin(crossing.narrow, crossing.module, crossing.op, reason)
            else:
                unlike.append(crossing)
        for crossing in unlike:
            self.space.merge(crossing.wide, crossing.narrow)

    def _alike(self, crossing: Crossing) -> bool:
        """Whether the wide labels vary along none of the narrow ones' dimensions, and along others."""
        roots, narrow = self.space.roots()[crossing.wide.numpy()], crossing.narrow.shape
        first = roots[tuple(slice(0, 1 if size > 1 else None) for size in narrow)]
        return bool((roots == first).all() and (first != first.flat[0]).any())

    def settle_grids(self) -> None:
        """Where labels vary along several dimensions of one tensor, let whole rows or columns die.

        A tensor can only lose whole slices: of the dimensions in which its labels still vary, the longest
        keeps its freedom (the first of equals: heads before what is in them).
        """
        self._settle_crossings()
        seen: set[bytes] = set()
        for grid in self.findings.grids:
            roots = self.space.roots()[grid.numpy()]
            key = hashlib.blake2b(np.ascontiguousarray(roots)).digest() + str(roots.shape).encode()
            if key in seen:
                continue
            seen.add(key)
            free = [d for d, size in enumerate(roots.shape) if size > 1 and (roots != roots.take([0], d)).any()]
            if len(free) > 1:
                kept = max(free, key=lambda dim: roots.shape[dim])
                self.space.merge_along(grid, [dim for dim in free if dim != kept])

    def settle_recurrent(self, model: nn.Module) -> None:
        """Let the layers and directions of one recurrent module lose the same hidden units: it has one width."""
        for path, module in model.named_modules():
            if isinstance(module, nn.RNNBase):
                names = [f"{path}.{name}".lstrip(".") for name in module._flat_weights_names]
                sides = [Side(name, 1) for name in names if "weight_hh" in name and Side(name, 1) in self.space.blocks]
                for side in sides[1:]:
                    self.space.merge(self._labels_of(sides[0]), self._labels_of(side))
                if module.proj_size:
                    self.pin_tensors(names, "its hidden units are projected")

    def _labels_of(self, side: Side) -> Tensor:
        start, size = self.space.blocks[side]
        return torch.arange(start, start + size)

    def settle_zeroed(self) -> None:
        """Keep the channels that a statistic of a kernel counts on to be zero where no gate sees to it."""
        for zeroed in self.findings.zeroed:
            side = self.space.side_of(zeroed.labels)
            if side not in self.findings.gated:
                self.space.pin(zeroed.labels, zeroed.module, zeroed.op, "normalised over its channels")

    def has_classes_of(self, other: Labelling) -> bool:
        """Whether the same indices of tensors go together, and stay, in both, of a model that was recorded twice."""
        if self.space.blocks.keys() != other.space.blocks.keys():
            return False
        here, there = (
            one.numbering()[np.concatenate([one._labels_of(side).numpy() for side in self.space.blocks])]
            for one in (self, other)
        )
        pairs = np.unique(np.stack([here, there]), axis=1)
        alike = all(len(np.unique(own)) == pairs.shape[1] for own in (here, there))
        return alike and np.array_equal(here == ALWAYS, there == ALWAYS)

    def pin_tensors(self, names: Iterable[str], reason: str) -> None:
        """Keep every channel of these parameters and buffers."""
        names = set(names)
        for side in self.space.blocks:
            if side.tensor in names:
                self.space.pin(self._labels_of(side), side.tensor.rpartition(".")[0], "", reason)

    def pin_values(
        self, tensors: Iterable[Tensor], known: Mapping[int, Labelled], path: str, op: str, reason: str
    ) -> None:
        """Keep every channel of these tensors, whose labels `known` has by their ids."""
        for tensor in tensors:
            for layer in known[id(tensor)].layers if id(tensor) in known else ():
                self.space.pin(layer, path, op, reason)

    def pinned(self, labels: Tensor) -> np.ndarray:
        """Which labels always stay, bool of the labels' shape."""
        return self.space.pinned_roots()[self.space.roots()[labels.numpy()]]

    def numbering(self) -> np.ndarray:
        """Class of each label, int32: 0, 1, ... for those that may die, in order; `ALWAYS` for the others.

        It is kept until something is merged, pinned or gated: not to be written to.
        """
        roots, pinned = self.space.roots(), self.space.pinned_roots()
        if self._numbered is None or self._numbered[0] is not roots or self._numbered[1] != self._noted():
            mortal = np.zeros(self.space.count, bool)
            for side in self.findings.gated:
                start, size = self.space.blocks[side]
                mortal[roots[start : start + size]] = True
            mortal &= ~pinned
            number = np.full(self.space.count, ALWAYS, np.int32)
            number[mortal] = np.arange(mortal.sum(), dtype=np.int32)
            give_members(number, roots)
            self._numbered = (roots, self._noted(), number)
        return self._numbered[2]

    def _noted(self) -> tuple[int, int]:
        return len(self.space.notes), len(self.findings.gated)

    def stays(self, live: Tensor) -> Tensor:
        """Which labels stay when the classes in `live` do, bool of shape (labels,)."""
        return torch.from_numpy(picked(np.append(live.cpu().numpy(), True), self.numbering()))

    def channel_map(self, samples: int = 1) -> ChannelMap:
        """The partition of channels, from all that was merged and pinned so far.

        Args:
            samples: how many samples the recorded forward was run on; costs are for one.
        """
        number = self.numbering()
        classes = {}
        for side, (start, size) in self.space.blocks.items():
            labels = number[start : start + size]
            if (labels != ALWAYS).any():
                classes[side] = torch.from_numpy(labels.astype(np.int64))
        kernels = _sum_calls([_counted(call, number) for call in self.findings.kernels], samples)
        sizes = {side: self._size(side) for kernel in kernels for side in (kernel.input_side, kernel.output_side)}
        gated = tuple(k.input_side for k in kernels if k.input_side in self.findings.gated and k.input_side in classes)
        return ChannelMap(int(number.max(initial=ALWAYS)) + 1, classes, sizes, kernels, gated, self._pins())

    def _size(self, side: Side) -> int:
        return self.space.blocks[side][1] if side in self.space.blocks else 1

    def _pins(self) -> tuple[Pin, ...]:
        """Each note with the sides of its labels' classes, notes of the same place and reason together."""
        roots = self.space.roots()
        noted: dict[tuple[str, str, str], list[Tensor]] = {}
        for note in self.space.notes:
            noted.setdefault((note.module, note.op, note.reason), []).append(note.labels)
        pins = []
        for place, labels in noted.items():
            hit = np.zeros(self.space.count, bool)
            for of_note in labels:
                hit[roots[of_note.numpy()]] = True
            give_members(hit, roots)
            sides = [side for side, (at, size) in self.space.blocks.items() if hit[at : at + size].any()]
            pins += [Pin(*place, tuple(sides))] if sides else []
        return tuple(pins)


def _unused(node: fx.Node) -> frozenset[int]:
    """Places of those of a call's several results that nothing is computed from."""
    picked = [user for user in node.users if is_getitem(user)]
    return frozenset(user.args[1] for user in picked if not user.users)


def _counted(call: KernelCall, number: np.ndarray) -> Kernel:
    """The kernel with the classes that it runs for, each as often as it is met among the rows compared to others."""
    if call.rows is None:
        return call.kernel
    classes, times = np.unique(number[call.rows.numpy()], return_counts=True)
    if (classes == ALWAYS).all():
        return call.kernel
    repeats = tuple(np.repeat(classes, times // np.gcd.reduce(times)).tolist())
    return replace(
        call.kernel, macs=call.kernel.macs / len(repeats), outputs=call.kernel.outputs / len(repeats), repeats=repeats
    )


def _once(kernel: Kernel) -> Kernel:
    """The kernel with the costs of all that it runs for."""
    times = len(kernel.repeats) or 1
    return replace(kernel, macs=kernel.macs * times, outputs=kernel.outputs * times, repeats=())


def _sum_calls(kernels: list[Kernel], samples: int) -> tuple[Kernel, ...]:
    """One entry a weight: the costs of its calls added up, for one sample.

    Where the calls run for other channels each, no product is the costs of all: what they run for stays, then.
    """
    summed: dict[tuple[str, int], Kernel] = {}
    for kernel in kernels:
        key = (kernel.weight, kernel.input_dim)
        before = summed.get(key, replace(kernel, macs=0.0, outputs=0.0))
        if kernel.macs and before.macs and kernel.repeats != before.repeats:
            kernel, before = _once(kernel), _once(before)
        summed[key] = replace(
            before,
            macs=before.macs + kernel.macs / samples,
            outputs=before.outputs + kernel.outputs / samples,
            mixes=before.mixes or kernel.mixes,
            repeats=kernel.repeats if kernel.macs else before.repeats,
        )
    return tuple(summed.values())
