"""Channel labels: a number for each index of each tensor, and a union-find structure of those that were merged.

Two channels that must live or die together carry one label. Every index along every dimension of every parameter and
buffer gets a label of its own. Labels travel with the values that are computed from the parameters. Labels that meet
are merged; labels of channels that an op needs all of are pinned. The result is a partition of the labels.

A tensor's labels are a few *layers*: integer tensors of size 1 along each dimension that they don't vary in. An
activation has one layer (its channels), a kernel has one for each dimension.

Merging is symmetric and applies to a label wherever it is. So an in-place op on a view needs no functional form of the
graph: `x[:, :n] += y` merges the labels of the slice, which are those of `x`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
import torch
from torch import Tensor

from rewriters.labelling.channel_map import Side

_JOINED_AT_ONCE = 2**13
"""At most this many pairs of labels are joined at once: it bounds the memory that joining takes, and fits caches."""


@dataclass(frozen=True)
class Labelled:
    """The labels of a tensor.

    Attributes:
        shape: the tensor's shape.
        layers: int32 label tensors with the tensor's number of dimensions, of size 1 along each dimension that they
            don't vary in. An element is removed if its label in any of the layers is. No two layers vary in the same
            dimension: an activation has one layer (its channels), a kernel one for each dimension.
        source: name of the parameter that the elements come from, moved or scaled: where its columns are zero, so are
            these.
        derived: the elements are computed from the parameter `source` in another way. Each column comes from that
            column and from statistics: where the parameter's columns are zero, these need not be.
        boolean: the elements are true or false; as an index, the tensor is a mask.
    """

    shape: tuple[int, ...]
    layers: tuple[Tensor, ...] = ()
    source: str | None = None
    derived: bool = False
    boolean: bool = False

    @classmethod
    def unknown(cls, tensor: Tensor) -> Labelled:
        """A tensor without labels."""
        return cls(tuple(tensor.shape), boolean=tensor.dtype is torch.bool)

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def layer(self, dim: int) -> Tensor | None:
        """The layer that varies along `dim`, or None."""
        return next((layer for layer in self.layers if layer.shape[dim] > 1), None)


def varying(layer: Tensor) -> tuple[int, ...]:
    """The dimensions along which a layer's labels vary."""
    return tuple([dim for dim, size in enumerate(layer.shape) if size > 1])  # faster than from a generator


def compress(labels: Tensor) -> Tensor:
    """The same labels, with size 1 along each dimension that they don't vary in."""
    for dim, size in enumerate(labels.shape):
        if size > 1:
            first = labels.narrow(dim, 0, 1)
            if labels.stride(dim) == 0 or (not _is_line(labels, dim) and torch.equal(first.expand_as(labels), labels)):
                labels = first
    held = labels.untyped_storage().nbytes()
    return labels.clone() if held > 2 * labels.nbytes else labels


def reshaped(labels: Tensor, before: Sequence[int], after: Sequence[int]) -> Tensor:
    """Labels of a tensor after a reshape.

    Dimensions that become others by themselves, and that labels don't vary in, aren't repeated.

    Args:
        labels: of the tensor before, of size 1 where they don't vary.
        before: the tensor's shape before.
        after: its shape after.
    """
    if 0 in before:
        return labels.expand(tuple(before)).reshape(tuple(after))
    wide: list[int] = []
    narrow: list[int] = []
    for old, new in parts(before, after):
        varies = labels.shape[old].numel() > 1
        wide += before[old] if varies else labels.shape[old]
        narrow += after[new] if varies else [1] * len(after[new])
    return labels.expand(wide).reshape(narrow).expand(tuple(after))


def parts(before: Sequence[int], after: Sequence[int]) -> Iterator[tuple[slice, slice]]:
    """Split a reshape into its smallest independent parts: slices of dimensions before and after.

    Both shapes have the same number of elements, and so have the two slices of each part.
    """
    old = new = 0
    while old < len(before) or new < len(after):
        begin = old, new
        old, new = min(old + 1, len(before)), min(new + 1, len(after))
        while (elements := prod(before[begin[0] : old])) != (wanted := prod(after[begin[1] : new])):
            old, new = (old + 1, new) if elements < wanted else (old, new + 1)
        yield slice(begin[0], old), slice(begin[1], new)


def _is_line(labels: Tensor, dim: int) -> bool:
    # A layer along a single dimension had distinct labels once: it is taken to vary without a comparison.
    return labels.numel() == labels.shape[dim]


@dataclass(frozen=True)
class PinNote:
    """Labels that an op pins, with the op's module and the reason."""

    labels: Tensor
    module: str
    op: str
    reason: str


class LabelSpace:
    """Hands out labels and remembers which were merged and which were pinned."""

    def __init__(self) -> None:
        self.count = 0
        self.blocks: dict[Side, tuple[int, int]] = {}
        self._side_at: dict[int, Side] = {}  # by its first label
        self.notes: list[PinNote] = []
        self._roots = np.zeros(0, np.int32)
        self._merged: list[tuple[Tensor, Tensor]] = []  # since these roots were found
        self._pinned = np.zeros(0, bool)  # of these roots, by the first `_noted` notes
        self._noted = 0

    def fork(self) -> LabelSpace:
        """A copy that can change without changing this space."""
        other = LabelSpace()
        other.count, other.blocks, other.notes = self.count, dict(self.blocks), list(self.notes)
        other._side_at = dict(self._side_at)
        other._roots, other._merged = self._roots, list(self._merged)
        other._pinned = np.zeros(len(self._roots), bool)
        return other

    def fresh(self, count: int) -> Tensor:
        """`count` new labels, shape (count,)."""
        self.count += count
        return torch.arange(self.count - count, self.count, dtype=torch.int32)

    def fresh_along(self, shape: Sequence[int], dim: int) -> Tensor:
        """New labels along one dimension of a tensor of this shape, with size 1 along the others."""
        return self.fresh(shape[dim]).view([size if other == dim else 1 for other, size in enumerate(shape)])

    def own(self, name: str, shape: Sequence[int]) -> Labelled:
        """The own labels of a parameter or buffer: a layer for each dimension longer than 1."""
        layers = []
        for dim, size in enumerate(shape):
            if size > 1:
                side = Side(name, dim)
                if side in self.blocks:
                    start, _ = self.blocks[side]
                    labels = torch.arange(start, start + size, dtype=torch.int32)
                else:
                    self.blocks[side] = (self.count, size)
                    self._side_at[self.count] = side
                    labels = self.fresh(size)
                layers.append(labels.view([size if other == dim else 1 for other in range(len(shape))]))
        return Labelled(tuple(shape), tuple(layers), source=name)

    def labels_of(self, side: Side) -> Tensor:
        """The labels of a side's indices, in order."""
        start, size = self.blocks[side]
        return torch.arange(start, start + size)

    def owned(self, labels: Tensor) -> bool:
        """Whether any of these labels is merged with a parameter's own."""
        mine = labels.flatten().numpy()
        if self._on_a_side(mine).any():
            return True
        roots = self.roots()
        return bool(self._on_a_side(np.flatnonzero(np.isin(roots, roots[mine]))).any())

    def _on_a_side(self, labels: np.ndarray) -> np.ndarray:
        """Whether each label is a parameter's own."""
        blocks = np.array([(0, 0), *self.blocks.values()])
        starts, sizes = blocks[np.searchsorted(blocks[:, 0], labels, "right") - 1].T
        return labels - starts < sizes

    def side_of(self, labels: Tensor) -> Side | None:
        """The side whose own labels these are, each once and in order, or None."""
        flat = labels.flatten()
        side = self._side_at.get(int(flat[0]))
        if side is None or self.blocks[side][1] != flat.numel():
            return None
        return side if _counts_up(flat.numpy()) else None

    def sides_holding(self, labels: Tensor, tensor: str) -> list[Side]:
        """The sides of a tensor that hold any of these labels."""
        low, high = int(labels.min()), int(labels.max())
        sides = (Side(tensor, dim) for dim in range(8))
        blocks = [(side, self.blocks[side]) for side in sides if side in self.blocks]
        return [side for side, (start, size) in blocks if start <= high and low < start + size]

    def merge(self, first: Tensor, second: Tensor) -> None:
        """Couple labels that meet, so that they live or die together. The tensors are broadcast."""
        if first.shape != second.shape:
            first, second = torch.broadcast_tensors(first, second)
        if not torch.equal(first, second):
            self._merged.append((first, second))

    def merge_along(self, layer: Tensor, dims: Iterable[int]) -> Tensor:
        """Merge a layer's labels along `dims`; returns the layer with size 1 there."""
        narrowed = layer
        for dim in dims:
            narrowed = narrowed.narrow(dim, 0, 1)
        if narrowed.shape != layer.shape:
            self.merge(narrowed, layer)
        return narrowed

    def pin(self, labels: Tensor, module: str, op: str, reason: str) -> None:
        """Pin these labels: they always stay."""
        self.notes.append(PinNote(labels.flatten(), module, op, reason))

    def roots(self) -> np.ndarray:
        """For each label the smallest label that it was merged with, int32 of shape (count,)."""
        if self._merged or len(self._roots) != self.count:
            self._roots = _grown(self._roots, self.count)  # a new array: a fork may have the one before
            while self._merged:
                first, second = (np.concatenate(ends) for ends in zip(*self._next_merged(), strict=True))
                _join(self._roots, first, second)
            _flatten(self._roots)
            self._pinned, self._noted = np.zeros(self.count, bool), 0
        return self._roots

    def _next_merged(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Remove pairs of merged labels from the list, as many as are joined at once."""
        left = _JOINED_AT_ONCE
        while self._merged and left > 0:
            first, second = (labels.reshape(-1) for labels in self._merged.pop())
            if len(first) > left:
                self._merged.append((first[left:], second[left:]))
            yield first[:left].numpy(), second[:left].numpy()
            left -= len(first)

    def pinned_roots(self) -> np.ndarray:
        """Whether anything pins the class of a root, bool of shape (count,)."""
        roots = self.roots()
        for note in self.notes[self._noted :]:
            self._pinned[roots[note.labels.numpy()]] = True
        self._noted = len(self.notes)
        return self._pinned


def _counts_up(labels: np.ndarray) -> bool:
    """Whether each label is the one before plus one."""
    parts = (labels[start : start + _JOINED_AT_ONCE + 1] for start in range(0, len(labels), _JOINED_AT_ONCE))
    return all((part[1:] - part[:-1] == 1).all() for part in parts)


def _grown(root: np.ndarray, count: int) -> np.ndarray:
    """The roots of `count` labels, where each new one is its own root."""
    grown = np.arange(count, dtype=np.int32)
    grown[: len(root)] = root
    return grown


def _join(root: np.ndarray, first: np.ndarray, second: np.ndarray) -> None:
    """Hook the larger root of every edge onto the smaller one, for all edges at once, until nothing changes.

    Paths are shortened only for roots that were hooked, so the cost depends on the edges and not on all labels.
    """
    first, second = _top(root, first), _top(root, second)
    while (apart := first != second).any():
        first, second = first[apart], second[apart]
        larger = np.maximum(first, second)
        np.minimum.at(root, larger, np.minimum(first, second))
        up = root[larger]
        while not np.array_equal(above := root[up], up):
            root[larger] = up = above
        first, second = root[first], root[second]


def _top(root: np.ndarray, at: np.ndarray) -> np.ndarray:
    """The roots of these elements."""
    while not np.array_equal(up := root[at], at):
        at = up
    return at


def _flatten(root: np.ndarray) -> None:
    """Point every element at its root, a part at a time, so that no second array of this size is needed."""
    for start in range(0, len(root), _JOINED_AT_ONCE):
        part = slice(start, start + _JOINED_AT_ONCE)
        root[part] = _top(root, root[part])


def give_members(values: np.ndarray, roots: np.ndarray) -> None:
    """Give every label the value of its root, in place. A root's value doesn't change."""
    for start in range(0, len(roots), _JOINED_AT_ONCE):
        part = slice(start, start + _JOINED_AT_ONCE)
        values[part] = values[roots[part]]


def picked(values: np.ndarray, index: np.ndarray) -> np.ndarray:
    """values[index], a part at a time: numpy copies an index that isn't of its own index type."""
    out = np.empty(index.shape, values.dtype)
    for start in range(0, len(index), _JOINED_AT_ONCE):
        part = slice(start, start + _JOINED_AT_ONCE)
        out[part] = values[index[part]]
    return out
