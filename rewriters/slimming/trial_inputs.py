"""Inputs for trial runs: the example, and smaller ones made from it that take less time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from rewriters.analysis import samples_in

Inputs = tuple[tuple[Any, ...], dict[str, Any]]

_SIDE = 64
"""About how wide and high the images of a small trial are: two pixels are left of them at a stride of 32."""


def smaller_inputs(args: tuple[Any, ...], kwargs: Mapping[str, Any], most_samples: int | None) -> Iterator[Inputs]:
    """The example inputs, smallest first: small images of few samples, few samples, the example itself.

    Args:
        args: example inputs by position.
        kwargs: example inputs by name.
        most_samples: how many samples the small ones have at most; all of the example's if None.
    """
    samples = samples_in(args, kwargs)
    fewer = samples if most_samples is None else min(samples, most_samples)
    inputs = (tuple(args), dict(kwargs))
    few = changed(inputs, lambda tensor: _first(tensor, samples, fewer))
    small = changed(few, _small_image)
    sizes = [_elements(one) for one in (small, few, inputs)]
    for place, one in enumerate((small, few, inputs)):
        if sizes[place] not in sizes[place + 1 :]:
            yield one


def changed(inputs: Inputs, change: Callable[[Tensor], Tensor]) -> Inputs:
    """Inputs with each tensor changed, except sparse ones."""
    made: Inputs = tree_map_only(Tensor, lambda x: change(x) if x.layout is torch.strided else x, inputs)
    return made


def _first(tensor: Tensor, samples: int, count: int) -> Tensor:
    return tensor[:count] if tensor.ndim and tensor.shape[0] == samples else tensor


def _small_image(tensor: Tensor) -> Tensor:
    """An image of about 64 by 64 pixels, cut out of a large one; both sides are multiples of 32 then."""
    if tensor.ndim < 4 or not tensor.is_floating_point() or min(tensor.shape[-2:]) < 2 * _SIDE:
        return tensor
    by = min(tensor.shape[-2:]) // _SIDE
    height, width = (max(32, size // by // 32 * 32) for size in tensor.shape[-2:])
    return tensor[..., :height, :width]


def _elements(inputs: Inputs) -> int:
    from_tensors: list[int] = []
    tree_map_only(Tensor, lambda tensor: from_tensors.append(tensor.numel()), inputs)
    return sum(from_tensors)


def share_of(inputs: Inputs, example: Inputs) -> float:
    """The part of the example's elements that inputs have."""
    return _elements(inputs) / max(1, _elements(example))
