"""Resources that are products of live counts: FLOPs, parameters and bytes of activations.

Guo et al., "GDP", equation 5: R(c) = sum over pairs of layers a_lk c_l c_k + sum over layers b_l c_l. A layer may run
once for each channel of other layers, as a mixer's token-mixing layers or a layer shared by all heads do. Then the
count of these channels is a third factor.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor, nn

from autogate.budget.resource import End, Resource, SideCounts
from rewriters import AutogateError, ChannelMap, Kernel, Side


class Term(NamedTuple):
    """One product of a resource: coefficient * live counts of the ends `left`, `right` and `third`.

    An end of None counts as 1.
    """

    coefficient: float
    left: int | None = None
    right: int | None = None
    third: int | None = None


class Products(Resource):
    """A resource R(live) = sum over terms of coefficient * live(left end) * live(right end) * live(third end).

    For FLOPs and parameters, counts and coefficients are whole numbers, and float64 holds such sums exactly in any
    order of summation. So every process of a distributed run finds the same share.

    Args:
        sides: what counts the live channels on the ends.
        terms: the products.
        whole: the value that shares are relative to; the value with every class alive if None.
    """

    def __init__(self, sides: SideCounts, terms: Sequence[Term], whole: float | None = None):
        super().__init__(sides.size, whole)
        self._sides = sides
        self._coefficient = torch.tensor([term.coefficient for term in terms], dtype=torch.float64)
        self._factors = [
            torch.tensor([sides.ends if end is None else end for end in ends], dtype=torch.int64)
            for ends in ([term.left for term in terms], [term.right for term in terms], [term.third for term in terms])
        ]
        self._shared = self._shared_ends(terms)

    def value(self, live: Tensor) -> Tensor:
        counts = self._counts(live)
        left, right, third = self._factors
        return (self._coefficient * counts[left] * counts[right] * counts[third]).sum()

    def price(self, live: Tensor) -> Tensor:
        """The derivative by each class's count."""
        counts = self._counts(live)
        slopes = torch.zeros_like(counts)
        left, right, third = self._factors
        for end, one, other in ((left, right, third), (right, left, third), (third, left, right)):
            slopes.index_add_(0, end, self._coefficient * counts[one] * counts[other])
        return self._sides.per_class(slopes[:-1])

    def drop(self, live: Tensor) -> Tensor:
        """The price, minus what a class on several ends of one term is charged for more than once."""
        row, third, factor = self._shared
        twice = torch.zeros(len(self._sides.profiles), dtype=torch.float64)
        twice.index_add_(0, row, factor * self._counts(live)[third])
        return self.price(live) - self._sides.of_profiles(twice)

    def _counts(self, live: Tensor) -> Tensor:
        """Live channels on every end, followed by a 1 for the ends that are None."""
        counts = self._sides.counts(live)
        return torch.cat([counts, counts.new_ones(1)])

    def _shared_ends(self, terms: Sequence[Term]) -> tuple[Tensor, Tensor, Tensor]:
        """For profiles on several ends of a term: the profile, an end, and a factor of that end's live count.

        Without one class that is k, m and n times on the ends of a term, c * a * b * d falls by the price of that class
        minus c * (m * n * a + k * n * b + k * m * d - k * m * n).
        """
        on: dict[int, list[int]] = {}
        for place, term in enumerate(terms):
            for end in (end for end in term[1:] if end is not None):
                on.setdefault(end, []).append(place)
        one = self._sides.ends  # the extra end, whose count is 1
        found: list[tuple[int, int, float]] = []
        for row, counts in enumerate(self._sides.profiles):
            held = dict(counts)
            touched = Counter(place for end in held for place in on.get(end, ()))
            for term in (terms[place] for place, times in touched.items() if times > 1):
                ends = [one if end is None else end for end in term[1:]]
                k, m, n = (held.get(end, 0) for end in ends)
                shares = zip((*ends, one), (m * n, k * n, k * m, -k * m * n), strict=True)
                found += [(row, end, term.coefficient * share) for end, share in shares if share]
        rows, held_by, shared = zip(*found, strict=True) if found else ((), (), ())
        return torch.tensor(rows).long(), torch.tensor(held_by).long(), torch.tensor(shared, dtype=torch.float64)


class Product(NamedTuple):
    """The cost of a part of the model: coefficient * live channels on each of at most three ends.

    `original` is False for layers that prepare added: shares are relative to the model without them.
    """

    coefficient: float
    ends: tuple[End, ...]
    original: bool = True


class ChannelProducts(Products):
    """A resource made of products of live channels of a channel map."""

    def __init__(self, channel_map: ChannelMap, products: Iterable[Product]):
        products = list(products)
        number: dict[End, int] = {}
        terms = [
            Term(coefficient, *(number.setdefault(end, len(number)) for end in ends))
            for coefficient, ends, _ in products
        ]
        counts = SideCounts.along(channel_map, list(number))
        whole = None
        if not all(product.original for product in products):
            original = [term for term, product in zip(terms, products, strict=True) if product.original]
            whole = Products(counts, original).whole
        super().__init__(counts, terms, whole)


class Flops(ChannelProducts):
    """The multiply-adds of a forward pass over one sample, from the kernels' `macs` in the channel map.

    Args:
        channel_map: classes and kernels.
        model: not used, because the map has everything; all resources are made from both.
        added: weights of layers that were not in the user's model. They cost FLOPs, but shares are relative to the
            model without them.
    """

    name = "FLOPs"

    def __init__(self, channel_map: ChannelMap, model: nn.Module | None = None, added: Collection[str] = ()):
        products = (
            Product(kernel.macs, (kernel.input_side, kernel.output_side, *_repeats(kernel)), kernel.weight not in added)
            for kernel in channel_map.kernels
        )
        super().__init__(channel_map, products)


class Params(ChannelProducts):
    """The number of a model's parameters. A shared parameter counts once.

    Args:
        channel_map: classes and the sides they are on.
        model: the model that the map was made from.
        added: parameters that were not in the user's model: see `Flops`.

    Raises:
        AutogateError: a parameter has channels in more than three dimensions.
    """

    name = "parameters"

    def __init__(self, channel_map: ChannelMap, model: nn.Module, added: Collection[str] = ()):
        labelled = _labelled_dimensions(channel_map)
        products = []
        for name, parameter in _unique_parameters(model, labelled):
            dims = labelled.get(name, ())
            if len(dims) > 3:
                raise AutogateError(
                    f"it has channels in {len(dims)} dimensions, and at most three can be counted.",
                    where=name,
                    remedy="Budget FLOPs instead, or keep the module's channels with `ignore`.",
                )
            each = parameter.numel() / prod(parameter.shape[dim] for dim in dims)
            products.append(Product(each, tuple(Side(name, dim) for dim in dims), name not in added))
        super().__init__(channel_map, products)


class Activations(ChannelProducts):
    """The bytes that convolutions and linear layers output for one sample.

    This is the definition of activations in Radosavovic et al., "Designing Network Design Spaces", section 4, who find
    that the run time on accelerators follows them more closely than FLOPs; fvcore counts the same elements.

    Args:
        channel_map: classes and kernels.
        model: the model that the map was made from. The elements of an output have the dtype of its kernel, or of the
            model's first tensor if the kernel is computed in the forward.
        added: weights of layers that were not in the user's model: see `Flops`.
    """

    name = "activations"

    def __init__(self, channel_map: ChannelMap, model: nn.Module, added: Collection[str] = ()):
        tensors = dict((*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)))
        products = (
            Product(
                kernel.outputs * tensors[next(iter(tensors)) if kernel.computed else kernel.weight].element_size(),
                (*(Side(kernel.weight, dim) for dim in kernel.output_dims), *_repeats(kernel)),
                kernel.weight not in added,
            )
            for kernel in channel_map.kernels
        )
        super().__init__(channel_map, products)


def _repeats(kernel: Kernel) -> tuple[End, ...]:
    """The end for each channel of which a kernel runs once, if there is one."""
    return (kernel.repeats,) if kernel.repeats else ()


def _labelled_dimensions(channel_map: ChannelMap) -> Mapping[str, tuple[int, ...]]:
    dims: dict[str, tuple[int, ...]] = {}
    for side in channel_map.classes:
        dims[side.tensor] = (*dims.get(side.tensor, ()), side.dim)
    return dims


def _unique_parameters(model: nn.Module, preferred: Mapping[str, tuple[int, ...]]) -> list[tuple[str, nn.Parameter]]:
    """Every parameter once. If it has several names, the one that the channel map uses."""
    found: dict[int, tuple[str, nn.Parameter]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) not in found or name in preferred:
            found[id(parameter)] = (name, parameter)
    return list(found.values())
