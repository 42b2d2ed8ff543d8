"""What channels cost: the contract of a resource, and those that are bilinear in the live counts of kernels' sides.

Guo et al., "GDP", equation 5: R(c) = sum over pairs of layers a_lk c_l c_k + sum over layers b_l c_l.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import cached_property
from math import prod
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from rewriters.channel_map import ALWAYS, ChannelMap, Side, gather
from rewriters.errors import AutogateError


class Resource(ABC):
    """Something that a model has less of when channels die, and that a budget can ask a share of.

    A resource of one's own is a subclass that gives `value` and `price`, built from the channel map and the
    model: `prepare(model, resources={MyResource: 0.5})`. Both are asked for whenever a channel dies, so they
    should take time linear in the number of classes (`SideCounts` does the counting). They have to be the
    same in every process of a distributed run, and the object has to pickle.

    Args:
        size: number of classes.
        whole: what shares are relative to; the resource with every class alive if None.

    Attributes:
        name: what it is called in messages and in `Progress`.
    """

    name = "resource"

    def __init__(self, size: int, whole: float | None = None):
        self.size = size
        self._given_whole = whole

    @abstractmethod
    def value(self, live: Tensor) -> Tensor:
        """What the classes in `live` (bool, shape (classes,), on the CPU) leave of it: 0-dim float64.

        It must not grow when classes die.
        """

    @abstractmethod
    def price(self, live: Tensor) -> Tensor:
        """What one class more or less makes out: beta's second factor in equation 9.

        Returns:
            float64, shape (classes,), nonnegative; defined for dead classes also.
        """

    def drop(self, live: Tensor) -> Tensor:
        """What the value falls by when one class dies and all others stay, float64, shape (classes,).

        The price, unless a subclass knows better.
        """
        return self.price(live)

    @cached_property
    def whole(self) -> float:
        """What shares are relative to."""
        return float(self.value(self._all())) if self._given_whole is None else self._given_whole

    @cached_property
    def start(self) -> float:
        """The share with every class alive: 1, or more where layers were added to the model."""
        return self.share(self._all())

    @cached_property
    def least(self) -> float:
        """The share that is left when every class is dead: pinned channels stay."""
        return self.share(~self._all())

    def share(self, live: Tensor) -> float:
        """The part of the resource that `live` leaves."""
        return float(self.value(live)) / self.whole if self.whole else 1.0

    def _all(self) -> Tensor:
        return torch.ones(self.size, dtype=torch.bool)


class SideCounts:
    """Counts the live channels along many sides at once.

    Classes that lie on the same sides, equally often, are counted together ("profiles"), so a count costs
    one pass over the classes and one over the few profiles, however many layers there are.

    Args:
        size: number of classes.
        constants: count of each end that no class changes.
        ends: for each end (a side, or what one likes to count), the class of every index along it; `ALWAYS`
            entries are not counted.

    Attributes:
        size: number of classes.
        ends: number of ends.
        profiles: for each profile, the (end, count) pairs that one of its classes lies on.
    """

    def __init__(self, size: int, constants: Sequence[float], ends: Sequence[Sequence[int] | np.ndarray]):
        self.size = size
        self.ends = len(ends)
        self._constant = torch.tensor(constants, dtype=torch.float64)
        profile, self.profiles = gather(size, [np.asarray(classes, np.int64) for classes in ends])
        self._profile = torch.from_numpy(profile)
        entries = [(row, end, count) for row, counts in enumerate(self.profiles) for end, count in counts]
        self._row = torch.tensor([row for row, _, _ in entries], dtype=torch.int64)
        self._end = torch.tensor([end for _, end, _ in entries], dtype=torch.int64)
        self._count = torch.tensor([count for _, _, count in entries], dtype=torch.float64)

    @classmethod
    def along(cls, channel_map: ChannelMap, sides: Sequence[Side]) -> SideCounts:
        """One end for each of `sides`, pinned channels counting always."""
        known = channel_map.classes
        classes = [known[side].cpu().numpy() if side in known else np.empty(0, np.int64) for side in sides]
        pinned = [
            int(np.count_nonzero(labels == ALWAYS)) if side in known else channel_map.sizes[side]
            for side, labels in zip(sides, classes, strict=True)
        ]
        return cls(channel_map.size, pinned, classes)

    def counts(self, live: Tensor) -> Tensor:
        """Live channels on each end: float64, shape (ends,), from bool, shape (classes,)."""
        alive = self._constant.new_zeros(len(self.profiles)).index_add_(0, self._profile, live.to(torch.float64))
        return self._constant.index_add(0, self._end, self._count * alive[self._row])

    def per_class(self, per_end: Tensor) -> Tensor:
        """Sums what each end has per channel over the ends that a class lies on: the price, from slopes.

        Args:
            per_end: float64, shape (ends,).

        Returns:
            float64, shape (classes,).
        """
        sums = per_end.new_zeros(len(self.profiles)).index_add_(0, self._row, self._count * per_end[self._end])
        return self.of_profiles(sums)

    def of_profiles(self, values: Tensor) -> Tensor:
        """Each class's value, shape (classes,), from those of the profiles."""
        return values[self._profile]


class Term(NamedTuple):
    """One product of a resource: coefficient * live count of end `left` * live count of end `right`.

    An end that isn't named counts one.
    """

    coefficient: float
    left: int | None = None
    right: int | None = None


class Bilinear(Resource):
    """A resource R(live) = sum over terms of coefficient * live(left end) * live(right end).

    Counts and coefficients are whole numbers for FLOPs and parameters, and float64 holds such sums exactly,
    in whatever order they are taken: every process of a distributed run finds the same share.

    Args:
        sides: what the ends of the terms count.
        terms: the products.
        whole: what shares are relative to; the resource with every class alive if None.
    """

    def __init__(self, sides: SideCounts, terms: Sequence[Term], whole: float | None = None):
        super().__init__(sides.size, whole)
        self._sides = sides
        self._coefficient = torch.tensor([term.coefficient for term in terms], dtype=torch.float64)
        self._left, self._right = (
            torch.tensor([sides.ends if end is None else end for end in ends], dtype=torch.int64)
            for ends in ([term.left for term in terms], [term.right for term in terms])
        )
        self._square = self._squares(terms)

    def value(self, live: Tensor) -> Tensor:
        counts = self._counts(live)
        return (self._coefficient * counts[self._left] * counts[self._right]).sum()

    def price(self, live: Tensor) -> Tensor:
        """The derivative by each class's count."""
        counts = self._counts(live)
        slopes = torch.zeros_like(counts)
        slopes.index_add_(0, self._left, self._coefficient * counts[self._right])
        slopes.index_add_(0, self._right, self._coefficient * counts[self._left])
        return self._sides.per_class(slopes[:-1])

    def drop(self, live: Tensor) -> Tensor:
        """The price less what a class that lies on both ends of a term is charged twice for."""
        return self.price(live) - self._sides.of_profiles(self._square)

    def _counts(self, live: Tensor) -> Tensor:
        """Live channels of every end, and 1 for the ends that aren't named."""
        counts = self._sides.counts(live)
        return torch.cat([counts, counts.new_ones(1)])

    def _squares(self, terms: Sequence[Term]) -> Tensor:
        """For each profile: the sum over terms of coefficient * count on the left * count on the right."""
        squares = []
        touching: dict[int, list[tuple[float, int]]] = {}
        for coefficient, left, right in terms:
            if left is not None and right is not None:
                touching.setdefault(left, []).append((coefficient, right))
        for counts in self._sides.profiles:
            held = dict(counts)
            squares.append(
                sum(
                    coefficient * count * held.get(right, 0)
                    for end, count in counts
                    for coefficient, right in touching.get(end, ())
                )
            )
        return torch.tensor(squares, dtype=torch.float64)


class Product(NamedTuple):
    """What part of a model costs: coefficient * live channels of each of at most two sides.

    `original` is False for layers that prepare added: shares are relative to the model without them.
    """

    coefficient: float
    sides: tuple[Side, ...]
    original: bool = True


class OfProducts(Bilinear):
    """A bilinear resource over the sides of a channel map."""

    def __init__(self, channel_map: ChannelMap, products: Iterable[Product]):
        products = list(products)
        number: dict[Side, int] = {}
        terms = [
            Term(coefficient, *(number.setdefault(side, len(number)) for side in sides))
            for coefficient, sides, _ in products
        ]
        counts = SideCounts.along(channel_map, list(number))
        whole = None
        if not all(product.original for product in products):
            original = [term for term, product in zip(terms, products, strict=True) if product.original]
            whole = Bilinear(counts, original).whole
        super().__init__(counts, terms, whole)


class Flops(OfProducts):
    """The multiply-adds of a forward pass over one sample, with the macs that the map's kernels state.

    Args:
        channel_map: classes and kernels.
        model: not looked at, for the map knows all; resources are made from both.
        added: weights of layers that were not in the user's model: they cost what they cost, and shares are
            relative to the model without them.
    """

    name = "FLOPs"

    def __init__(self, channel_map: ChannelMap, model: nn.Module | None = None, added: Collection[str] = ()):
        products = (
            Product(kernel.macs, (kernel.input_side, kernel.output_side), kernel.weight not in added)
            for kernel in channel_map.kernels
        )
        super().__init__(channel_map, products)


class Params(OfProducts):
    """The number of a model's parameters, each shared one counted once.

    Args:
        channel_map: classes and where they lie.
        model: what it was made from.
        added: parameters that were not in the user's model: see `Flops`.

    Raises:
        AutogateError: a parameter carries channels in three dimensions or more.
    """

    name = "parameters"

    def __init__(self, channel_map: ChannelMap, model: nn.Module, added: Collection[str] = ()):
        labelled = _labelled_dimensions(channel_map)
        products = []
        for name, parameter in _unique_parameters(model, labelled):
            dims = labelled.get(name, ())
            if len(dims) > 2:
                raise AutogateError(
                    f"it carries channels in {len(dims)} dimensions, and a bilinear resource has two.",
                    where=name,
                    remedy="Budget FLOPs instead, or keep the module's channels with `ignore`.",
                )
            each = parameter.numel() / prod(parameter.shape[dim] for dim in dims)
            products.append(Product(each, tuple(Side(name, dim) for dim in dims), name not in added))
        super().__init__(channel_map, products)


class Activations(OfProducts):
    """The bytes of what convolutions and linear layers give out for one sample.

    Radosavovic et al., "Designing Network Design Spaces", section 4, define the activations so and find the run
    time on accelerators to go with them more closely than with FLOPs; fvcore counts the same elements.

    Args:
        channel_map: classes and kernels.
        model: what it was made from; an output's elements are of its kernel's type.
        added: weights of layers that were not in the user's model: see `Flops`.
    """

    name = "activations"

    def __init__(self, channel_map: ChannelMap, model: nn.Module, added: Collection[str] = ()):
        tensors = dict((*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)))
        products = (
            Product(
                kernel.outputs * tensors[kernel.weight].element_size(),
                tuple(Side(kernel.weight, dim) for dim in kernel.output_dims),
                kernel.weight not in added,
            )
            for kernel in channel_map.kernels
        )
        super().__init__(channel_map, products)


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
