"""The label pass: run a captured graph once on labels.

All that matters of a dead channel is that nothing reads it: each layer that sums over it multiplies it by a zero
column. So an op may do anything that lets dead elements act on dead elements only. Ops that only move data (view,
permute, cat, split, slice, expand, pixel_shuffle ...) run on the label layers themselves. Elementwise ops merge the
labels that meet: a residual add, a squeeze-excite product, a batch norm's vectors. A convolution or matrix product with
a parameter merges its input's labels with the parameter's input side and passes on those of the output side. An op that
mixes channels without a kernel that could be zeroed (softmax, a sum over the channels, an op without a rule) pins the
labels that reach it. What each op does is a rule: one function in `rules/`.

There is no rule for attention as such; heads come out of the views and products that it is written in. A product of
activations sums over the positions in a head, and no kernel stands there that could be zeroed. So labels that vary over
heads and positions are merged along the positions: whole heads die, in q, k, v and in the input of what follows.
`settling.py` says why heads and not positions.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from rewriters.labelling.channel_map import ALWAYS
from rewriters.labelling.labels import Labelled, LabelSpace, give_members, picked
from rewriters.labelling.rules import PRODUCTS, Findings, KernelCall, LabelledStatistic, OpCall, find_rule
from rewriters.recording import Capture, args_of, is_getitem, tensors_of


@dataclass
class Labelling:
    """Labels of every value of one or more captured graphs.

    Attributes:
        space: the labels.
        findings: what the rules noted: kernels, gated sides, grids.
        values: labels of each node's result (a list if it has several).
        statistics: the statistics that a node takes across channels.
    """

    space: LabelSpace = field(default_factory=LabelSpace)
    findings: Findings = field(default_factory=Findings)
    values: dict[fx.Node, Any] = field(default_factory=dict)
    statistics: dict[fx.Node, list[LabelledStatistic]] = field(default_factory=dict)
    _numbered: tuple[np.ndarray, tuple[int, int], np.ndarray] | None = field(default=None, init=False, repr=False)

    def run(self, captured: Capture, counted: bool = True) -> None:
        """Label every node of a captured model, whose outputs keep all their channels.

        Kernels of a run that is not `counted` (train mode beside eval mode) cost nothing.
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
        name = str(node.target)
        owned = name in captured.tensors and value.is_floating_point()
        if not owned:
            return Labelled.unknown(value)
        if not isinstance(value, nn.Parameter):
            self.findings.buffers.add(name)
        return self.space.own(name, value.shape)

    def _pin_outputs(self, node: fx.Node) -> None:
        for source in node.all_input_nodes:
            for layer in self.values[source].layers:
                self.space.pin(layer, "", "output", "the model returns it")

    def call(self, node: fx.Node) -> Any:
        """Labels of one recorded call's results, from the labels of its arguments."""
        if is_getitem(node):
            source, index = args_of(node)
            return self.values[source][index]
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), self.values.__getitem__)
        owner = node.meta["call"]
        path = owner.path if owner is not None else ""
        before = len(self.findings.statistics)
        result = self.apply(node.target, args, kwargs, node.meta["val"], path, self.findings, _unused(node))
        if len(self.findings.statistics) > before:
            self.statistics[node] = self.findings.statistics[before:]
        return result

    def apply(
        self, op: Any, args: Any, kwargs: Any, value: Any, path: str, findings: Findings,
        unused: frozenset[int] = frozenset(),
    ) -> Any:  # fmt: skip
        """Labels of `value`, the result of `op` on arguments with `Labelled` instead of tensors.

        If there are several results, `unused` are the positions of those that nothing is computed from.
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
        """Names of the parameters that a recorded convolution or matrix product uses; empty for other calls."""
        if node.op != "call_function" or is_getitem(node) or find_rule(node.target) not in PRODUCTS:
            return set()
        values = (self.values[source] for source in node.all_input_nodes)
        return {value.source for value in values if isinstance(value, Labelled) and value.source is not None}

    def by_tensor(self) -> dict[int, Labelled]:
        """Labels by the id of the fake tensor that carries them."""
        tensors = ((node.meta.get("val"), labels) for node, labels in self.values.items())
        return {id(value): labels for value, labels in tensors if isinstance(value, Tensor)}

    def fork(self) -> Labelling:
        """A copy, so that what is labelled next leaves no trace in this labelling."""
        return Labelling(self.space.fork(), self.findings.copy(), dict(self.values), dict(self.statistics))

    def merge_values(self, first: Labelled | None, second: Labelled | None, path: str) -> None:
        """Couple the channels of two values one by one; where only one value has labels, pin these."""
        known = [value for value in (first, second) if value is not None]
        shared = len(known) == 2 and known[0].ndim == known[1].ndim
        for value, other in (known, reversed(known)) if shared else ():
            for layer in value.layers:
                partners = [theirs for theirs in other.layers if theirs.shape == layer.shape]
                if partners:
                    self.space.merge(layer, partners[0])
                else:
                    self.space.pin(layer, path, "forward", "its calls take different paths")
        if not shared:
            for layer in (layer for value in known for layer in value.layers):
                self.space.pin(layer, path, "forward", "its calls take different paths")

    def pin_tensors(self, names: Iterable[str], reason: str) -> None:
        """Pin every channel of these parameters and buffers."""
        names = set(names)
        for side in self.space.blocks:
            if side.tensor in names:
                self.space.pin(self.space.labels_of(side), side.tensor.rpartition(".")[0], "", reason)

    def pin_values(
        self, tensors: Iterable[Tensor], known: Mapping[int, Labelled], path: str, op: str, reason: str
    ) -> None:
        """Pin every channel of these tensors, whose labels `known` holds by id."""
        for tensor in tensors:
            for layer in known[id(tensor)].layers if id(tensor) in known else ():
                self.space.pin(layer, path, op, reason)

    def pinned(self, labels: Tensor) -> np.ndarray:
        """Which of these labels are pinned, bool of the labels' shape."""
        return self.space.pinned_roots()[self.space.roots()[labels.numpy()]]

    def class_of_label(self) -> np.ndarray:
        """Class of each label, int32: 0, 1, ... in order for those that can be removed, `ALWAYS` for the others.

        The array is cached until something is merged, pinned or gated. Don't write to it.
        """
        roots, pinned = self.space.roots(), self.space.pinned_roots()
        if self._numbered is None or self._numbered[0] is not roots or self._numbered[1] != self._noted():
            removable = np.zeros(self.space.count, bool)
            for side in self.findings.gated:
                start, size = self.space.blocks[side]
                removable[roots[start : start + size]] = True
            removable &= ~pinned
            number = np.full(self.space.count, ALWAYS, np.int32)
            number[removable] = np.arange(removable.sum(), dtype=np.int32)
            give_members(number, roots)
            self._numbered = (roots, self._noted(), number)
        return self._numbered[2]

    def _noted(self) -> tuple[int, int]:
        return len(self.space.notes), len(self.findings.gated)

    def stays(self, live: Tensor) -> Tensor:
        """Which labels stay if the classes in `live` do, bool of shape (labels,)."""
        return torch.from_numpy(picked(np.append(live.cpu().numpy(), True), self.class_of_label()))


def _unused(node: fx.Node) -> frozenset[int]:
    """Positions of those of a call's several results that nothing is computed from."""
    picked = [user for user in node.users if is_getitem(user)]
    return frozenset(args_of(user)[1] for user in picked if not user.users)
