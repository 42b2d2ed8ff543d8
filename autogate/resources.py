"""What a channel costs: resources that are bilinear in the live counts of the two sides of each kernel.

Guo et al., "GDP", equation 5: R(c) = sum over pairs of layers a_lk c_l c_k + sum over layers b_l c_l.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from rewriters.channel_map import ALWAYS, ChannelMap, Side
from rewriters.errors import AutogateError


class Term(NamedTuple):
    """One product of a resource: coefficient * live count of `left` * live count of `right`."""

    coefficient: float
    left: int
    right: int


class Bilinear:
    """A resource R(live) = sum over terms of coefficient * live(left end) * live(right end).

    An end counts the live channels along one side of a kernel: a constant, and the live ones among the
    classes that lie on it, each as often as it does. Classes that lie on the same ends, equally often, cost
    the same, so they are counted together ("profiles"): a resource of a hundred kernels is a hundred terms
    over as many profiles, however many channels there are.

    Counts and coefficients are whole numbers for FLOPs and parameters, and float64 holds such sums exactly,
    in whatever order they are taken: every process of a distributed run finds the same share.

    Args:
        size: number of classes.
        terms: the products.
        constants: count of each end that no class changes.
        ends: for each end, the class of every index along it; `ALWAYS` entries are not counted.
        whole: what shares are relative to; the resource with every class alive if None.
    """

    def __init__(
        self, size: int, terms: Sequence[Term], constants: Sequence[float], ends: Sequence[Sequence[int]],
        whole: float | None = None,
    ):  # fmt: skip
        self.size = size
        self._coefficient = torch.tensor([term.coefficient for term in terms], dtype=torch.float64)
        self._left = torch.tensor([term.left for term in terms], dtype=torch.int64)
        self._right = torch.tensor([term.right for term in terms], dtype=torch.int64)
        self._constant = torch.tensor(constants, dtype=torch.float64)
        self._profile, rows = _profiles(size, ends)
        self._profiles = len(rows)
        entries = [(row, end, count) for row, counts in enumerate(rows) for end, count in counts]
        self._row = torch.tensor([row for row, _, _ in entries], dtype=torch.int64)
        self._end = torch.tensor([end for _, end, _ in entries], dtype=torch.int64)
        self._count = torch.tensor([count for _, _, count in entries], dtype=torch.float64)
        self._square = self._squares(terms, rows)
        everything = torch.ones(size, dtype=torch.bool)
        self.whole = float(self.value(everything)) if whole is None else whole
        """What shares are relative to."""
        self.start = self.share(everything)
        """The share with every class alive: 1, or more where layers were added to the model."""

    def value(self, live: Tensor) -> Tensor:
        """The resource that the classes in `live` (bool, shape (classes,)) leave: 0-dim float64."""
        counts = self._counts(live)
        return (self._coefficient * counts[self._left] * counts[self._right]).sum()

    def price(self, live: Tensor) -> Tensor:
        """The derivative of the resource by each class's count, beta's second factor in equation 9.

        Returns:
            float64, shape (classes,); defined for dead classes also.
        """
        return self._price_of_profile(live)[self._profile]

    def drop(self, live: Tensor) -> Tensor:
        """What the resource falls by when one class dies and all others stay, float64, shape (classes,).

        It is the price less what a class that lies on both ends of a term is charged twice for.
        """
        return (self._price_of_profile(live) - self._square)[self._profile]

    def share(self, live: Tensor) -> float:
        """The resource that `live` leaves, relative to the whole."""
        return float(self.value(live)) / self.whole if self.whole else 1.0

    def least_share(self) -> float:
        """The share that is left when every class is dead: pinned channels stay."""
        return self.share(torch.zeros(self.size, dtype=torch.bool))

    def _counts(self, live: Tensor) -> Tensor:
        alive = self._constant.new_zeros(self._profiles).index_add_(0, self._profile, live.to(torch.float64))
        return self._constant.index_add(0, self._end, self._count * alive[self._row])

    def _price_of_profile(self, live: Tensor) -> Tensor:
        counts = self._counts(live)
        by_end = torch.zeros_like(counts)
        by_end.index_add_(0, self._left, self._coefficient * counts[self._right])
        by_end.index_add_(0, self._right, self._coefficient * counts[self._left])
        return by_end.new_zeros(self._profiles).index_add_(0, self._row, self._count * by_end[self._end])

    def _squares(self, terms: Sequence[Term], rows: list[tuple[tuple[int, int], ...]]) -> Tensor:
        """For each profile: the sum over terms of coefficient * count on the left * count on the right."""
        squares = []
        touching: dict[int, list[Term]] = {}
        for term in terms:
            touching.setdefault(term.left, []).append(term)
        for counts in rows:
            held = dict(counts)
            squares.append(
                sum(
                    term.coefficient * count * held.get(term.right, 0)
                    for end, count in counts
                    for term in touching.get(end, ())
                )
            )
        return torch.tensor(squares, dtype=torch.float64)


class Flops(Bilinear):
    """The multiply-adds of a forward pass over one sample, with the macs that the map's kernels state.

    Args:
        channel_map: classes and kernels.
        added: weights of layers that were not in the user's model: they cost what they cost, and shares are
            relative to the model without them.
    """

    def __init__(self, channel_map: ChannelMap, added: Collection[str] = ()):
        builder = _EndBuilder(channel_map)
        terms = [
            Term(kernel.macs, builder.end(kernel.input_side), builder.end(kernel.output_side))
            for kernel in channel_map.kernels
        ]
        whole = sum(
            kernel.macs * channel_map.sizes[kernel.input_side] * channel_map.sizes[kernel.output_side]
            for kernel in channel_map.kernels
            if kernel.weight not in added
        )
        super().__init__(channel_map.size, terms, builder.constants, builder.ends, whole if added else None)


class Params(Bilinear):
    """The number of a model's parameters, each shared one counted once."""

    def __init__(self, channel_map: ChannelMap, model: nn.Module):
        builder = _EndBuilder(channel_map)
        labelled = _labelled_dimensions(channel_map)
        terms = []
        for name, parameter in _unique_parameters(model, labelled):
            dims = labelled.get(name, ())
            if len(dims) > 2:
                raise AutogateError(
                    f"{name} carries channels in {len(dims)} dimensions; a bilinear resource has two.",
                    remedy="Budget FLOPs instead.",
                )
            coefficient = float(parameter.numel())
            for dim in dims:
                coefficient /= parameter.shape[dim]
            ends = [builder.end(Side(name, dim)) for dim in dims]
            ends += [builder.one] * (2 - len(ends))
            terms.append(Term(coefficient, ends[0], ends[1]))
        super().__init__(channel_map.size, terms, builder.constants, builder.ends)


class _EndBuilder:
    """Gives each side of a map its end: the constant count and the classes on it."""

    def __init__(self, channel_map: ChannelMap):
        self._map = channel_map
        self._index: dict[Side, int] = {}
        self.one = 0
        self.constants: list[float] = [1.0]
        self.ends: list[list[int]] = [[]]

    def end(self, side: Side) -> int:
        if side not in self._index:
            classes = self._map.classes[side].tolist() if side in self._map.classes else []
            pinned = classes.count(ALWAYS) if classes else self._map.sizes[side]
            self._index[side] = len(self.ends)
            self.constants.append(float(pinned))
            self.ends.append(classes)
        return self._index[side]


def _profiles(size: int, ends: Sequence[Sequence[int]]) -> tuple[Tensor, list[tuple[tuple[int, int], ...]]]:
    """Each class's profile, shape (classes,), and for each profile the (end, count) pairs it stands for."""
    lies_on: list[dict[int, int]] = [{} for _ in range(size)]
    for end, classes in enumerate(ends):
        for label in classes:
            if label != ALWAYS:
                lies_on[label][end] = lies_on[label].get(end, 0) + 1
    found: dict[tuple[tuple[int, int], ...], int] = {}
    index = [found.setdefault(tuple(where.items()), len(found)) for where in lies_on]
    return torch.tensor(index, dtype=torch.int64), list(found)


def _labelled_dimensions(channel_map: ChannelMap) -> Mapping[str, tuple[int, ...]]:
    dims: dict[str, tuple[int, ...]] = {}
    for side in channel_map.classes:
        dims[side.tensor] = (*dims.get(side.tensor, ()), side.dim)
    return dims


def _unique_parameters(model: nn.Module, preferred: Mapping[str, tuple[int, ...]]) -> list[tuple[str, nn.Parameter]]:
    """Every parameter once, under the name that the map knows it by where it has several."""
    found: dict[int, tuple[str, nn.Parameter]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) not in found or name in preferred:
            found[id(parameter)] = (name, parameter)
    return list(found.values())
