"""The labels of what a forward runs while it is traced.

A traced call that ran at the same place when the model was captured, on the same labels, reuses the labels and tensors
from then. Rules run only for other calls, those of train mode, say.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from rewriters.labelling import Labelled, Labelling, varying
from rewriters.labelling.rules import Findings, LabelledStatistic, OpCall, elementwise
from rewriters.recording import ModuleCall, tensors_of

_AHEAD = 4
"""How far ahead to search for the recorded call that is traced: the forward may not repeat all that it ran."""


class TracedLabels:
    """Labels of the tensors in a trace, by id.

    Args:
        call: the recorded call that is traced.
        labelling: of the captured model.
        known: labels of the captured tensors, by id.
    """

    def __init__(self, call: ModuleCall, labelling: Labelling, known: Mapping[int, Labelled]):
        self._path, self._labelling = call.path, labelling
        self._alive: list[Any] = []  # ids of tensors are keys
        self._recorded = call.nodes[::-1]  # what ran in it, last first
        # Its own come first: copying all for each trace would take memory.
        self.known: ChainMap[int, Labelled] = ChainMap({}, known)  # type: ignore[arg-type]  # only the first is written

    def add(self, op: Any, args: Any, kwargs: Any, out: Any, findings: Findings, same: dict[int, Tensor]) -> None:
        """Label the results of a call.

        Args:
            op: the ATen op.
            args: its positional arguments.
            kwargs: its keyword arguments.
            out: its results.
            findings: what the op's rule notes goes here.
            same: receives the recorded tensors that equal the results, by the results' ids.
        """
        given = fx.node.map_aggregate((args, kwargs), lambda leaf: self.of(same.get(id(leaf), leaf)))
        recorded = self._recorded_as(op, given)
        if recorded is None:
            labels = self._labelling.apply(op, *given, out, self._path, findings)
        else:
            labels = self._labelling.values[recorded]
            findings.statistics += self._labelling.statistics.get(recorded, ())
            pairs = zip(tensors_of(out), tensors_of(recorded.meta["val"]), strict=True)
            same.update({id(tensor): other for tensor, other in pairs if _are_alike(tensor, other)})
        found = [label for label in (labels if isinstance(labels, list) else [labels]) if label is not None]
        for traced, label in zip(tensors_of(out), found, strict=True):
            tensor = same.get(id(traced), traced)
            self._alive.append(tensor)
            if self.known.get(id(tensor)) is not label:  # a recorded tensor may have been written to since
                self.known[id(tensor)] = label

    def _recorded_as(self, op: Any, given: Any) -> fx.Node | None:
        """The next recorded call, if it was this one on the same labels: its findings hold here too."""
        for place in range(len(self._recorded))[: -_AHEAD - 1 : -1]:
            node = self._recorded[place]
            if node.target is op and self._ran_on(node, given):
                del self._recorded[place:]
                return node
        return None

    def _ran_on(self, recorded: fx.Node, given: Any) -> bool:
        return _are_one(given, fx.node.map_arg((recorded.args, recorded.kwargs), self._labelling.values.__getitem__))

    def of(self, value: Any) -> Any:
        """The labels of a tensor; anything else as it is."""
        if not isinstance(value, Tensor):
            return value
        return self.known.get(id(value)) or Labelled.unknown(value)

    def along(self, statistic: LabelledStatistic, operands: Sequence[Any]) -> LabelledStatistic:
        """A statistic that a call takes, with the labels and the dimension of the operands that its channels lie along.

        The ATen op that takes it may have moved or repeated them: `torch.einsum` flattens what it sums over. The labels
        of a group norm are those of positions in a group, and stay so.
        """
        if statistic.op == str(torch.ops.aten.native_group_norm.default):
            return statistic
        lines = [
            (index, varying(layer)[0] - layer.ndim, layer.flatten())
            for index, operand in enumerate(operands)
            for layer in (self.of(operand).layers if isinstance(operand, Tensor) else ())
            if len(varying(layer)) == 1
        ]
        for is_same in (torch.equal, _have_the_same):
            found = [line for line in lines if is_same(line[2], statistic.labels)]
            if found:
                _, dim, labels = found[0]
                alike = tuple(index for index, other, own in found if other == dim and torch.equal(own, labels))
                return replace(statistic, labels=labels, dim=dim, operands=alike)
        return statistic

    def link(self, traced: Any, captured: Any) -> None:
        """Merge the labels of what was traced with those of what was captured at the same place.

        They differ only where an op made labels of its own (padding, zeros to concatenate): the rest of the model is
        coupled with those of the captured op, not with those of the traced op.
        """
        ours, theirs = tensors_of(traced), tensors_of(captured)
        if len(ours) != len(theirs):
            return  # train mode returns another number of tensors
        for a, b in zip(ours, theirs, strict=True):
            if a.shape == b.shape and a is not b:
                labelling = self._labelling
                pair = [self.of(a), self.of(b)]
                shapes = [tuple(a.shape)]
                call = OpCall("forward", (), {}, shapes, self._path, labelling.space, labelling.findings)
                elementwise.meet(call, pair)


def _have_the_same(labels: Tensor, others: Tensor) -> bool:
    return torch.equal(labels.unique(), others.unique())


def _are_one(one: Any, other: Any) -> bool:
    """Whether two arguments are the same labels, or have none, or are equal, or are containers of such arguments."""
    if isinstance(one, Labelled):
        return one is other or (not one.layers and one == other)
    if isinstance(one, (tuple, list)):
        return isinstance(other, (tuple, list)) and len(one) == len(other) and all(map(_are_one, one, other))
    if isinstance(one, dict):
        return isinstance(other, dict) and one.keys() == other.keys() and all(_are_one(one[k], other[k]) for k in one)
    return one == other


def _are_alike(tensor: Tensor, other: Tensor) -> bool:
    return (tensor.shape, tensor.stride(), tensor.dtype, tensor.device) == (
        other.shape, other.stride(), other.dtype, other.device
    )  # fmt: skip
