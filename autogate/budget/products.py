"""Resources that are products of live counts: FLOPs, parameters and bytes of activations.

Guo et al., "GDP", equation 5: R(c) = sum over pairs of layers a_lk c_l c_k + sum over layers b_l c_l. Where a layer
runs once for each channel of others, as a mixer's layers across tokens do, their count is a third factor.
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

    An end that isn't named counts one.
    """

    coefficient: float
    left: int | None = None
    right: int | None = None
    third: int | None = None


class Products(Resource):
    """A resource R(live) = sum over terms of coefficient * live(left end) * live(right end) * live(third end).

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
        """The price less what a class that lies on several ends of a term is charged repeatedly for."""
        row, third, factor = self._shared
        twice = torch.zeros(len(self._sides.profiles), dtype=torch.float64)
        twice.index_add_(0, row, factor * self._counts(live)[third])
        return self.price(live) - self._sides.of_profiles(twice)

    def _counts(self, live: Tensor) -> Tensor:
        """Live channels of every end, and 1 for the ends that aren't named."""
        counts = self._sides.counts(live)
        return torch.cat([counts, counts.new_ones(1)])

    def _shared_ends(self, terms: Sequence[Term]) -> tuple[Tensor, Tensor, Tensor]:
        """For profiles that lie on several ends of a term: the profile, an end, and a factor of that end's live count.

        Without one of a class that lies k, m and n times on its ends, c * a * b * d falls by the price of that one less
        c * (m * n * a + k * n * b + k * m * d - k * m * n).
        """
        on: dict[int, list[int]] = {}
        for place, term in enumerate(terms):
            for end in (end for end in term[1:] if end is not None):
                on.setdefault(end, []).append(place)
        one = self._sides.ends  # the end that counts one
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
    """What part of a model costs: coefficient * live channels of each of at most three ends.

    `original` is False for layers that prepare added: shares are relative to the model without them.
    """

    coefficient: float
    ends: tuple[End, ...]
    original: bool = True


class ChannelProducts(Products):
    """A resource made of products over the channels of a map."""

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
            Product(kernel.macs, (kernel.input_side, kernel.output_side, *_repeats(kernel)), kernel.weight not in added)
            for kernel in channel_map.kernels
        )
        super().__init__(channel_map, products)


class Params(ChannelProducts):
    """The number of a model's parameters, each shared one counted once.

    Args:
        channel_map: classes and where they lie.
        model: what it was made from.
        added: parameters that were not in the user's model: see `Flops`.

    Raises:
        AutogateError: a parameter carries channels in more than three dimensions.
    """

    name = "parameters"

    def __init__(self, channel_map: ChannelMap, model: nn.Module, added: Collection[str] = ()):
        labelled = _labelled_dimensions(channel_map)
        products = []
        for name, parameter in _unique_parameters(model, labelled):
            dims = labelled.get(name, ())
            if len(dims) > 3:
                raise AutogateError(
                    f"it carries channels in {len(dims)} dimensions, and a product has three factors.",
                    where=name,
                    remedy="Budget FLOPs instead, or keep the module's channels with `ignore`.",
                )
            each = parameter.numel() / prod(parameter.shape[dim] for dim in dims)
            products.append(Product(each, tuple(Side(name, dim) for dim in dims), name not in added))
        super().__init__(channel_map, products)


class Activations(ChannelProducts):
    """The bytes of what convolutions and linear layers give out for one sample.

    Radosavovic et al., "Designing Network Design Spaces", section 4, define the activations so and find the run
    time on accelerators to go with them more closely than with FLOPs; fvcore counts the same elements.

    Args:
        channel_map: classes and kernels.
        model: what it was made from; an output's elements are of its kernel's type, or the model's first
            tensor's where the kernel is computed.
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
    """The end that a kernel runs once for each channel of, if it does."""
    return (kernel.repeats,) if kernel.repeats else ()


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
