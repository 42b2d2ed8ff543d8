"""Calls that hold a size: how each family is written down for the sizes that are left.

A function here takes a traced node and what is known of the slimmed values around it, and returns the
node's new target, arguments and keyword arguments. It only has to be right where the call as it stands is
not: `resizing` tries that first, and checks what comes back.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

Call = tuple[Any, tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Resize:
    """What a family needs to know.

    Attributes:
        node: the traced call.
        full: full shapes of the results (tensors among them, in order).
        slim: their shapes after slimming.
        kept: (value, dim) -> which indices of a full tensor stay along a dimension, bool of shape (size,).
    """

    node: fx.Node
    full: list[tuple[int, ...]]
    slim: list[tuple[int, ...]]
    kept: Callable[[Tensor, int], Tensor]

    @property
    def args(self) -> tuple[Any, ...]:
        return self.node.args

    def value(self, arg: Any) -> Any:
        """The value an argument had when traced."""
        return fx.node.map_arg(arg, lambda node: node.meta["val"])

    def sizes(self, given: Any, offset: int = 0) -> list[Any]:
        """Sizes as they were given, those that changed replaced by what is left."""
        pairs = zip(self.full[0][offset:], self.slim[0][offset:], strict=False)
        return [new if old != new else size for size, (old, new) in zip(given, pairs, strict=False)]


def _spread(args: tuple[Any, ...]) -> tuple[list[Any], bool]:
    """Sizes given as `f(x, (a, b))` or as `f(x, a, b)`, and whether it was the former."""
    if len(args) == 2 and isinstance(args[1], (tuple, list)):
        return list(args[1]), True
    return list(args[1:]), False


def reshape(resize: Resize) -> Call:
    """x.view(sizes), x.reshape(sizes), x.expand(sizes), torch.reshape(x, sizes)."""
    given, packed = _spread(resize.args)
    sizes = resize.sizes(given)
    args = (resize.args[0], sizes) if packed else (resize.args[0], *sizes)
    return resize.node.target, args, dict(resize.node.kwargs)


def unflatten(resize: Resize) -> Call:
    """x.unflatten(dim, sizes)."""
    x, dim, given = resize.args[:3]
    first = resize.value(dim) % resize.value(x).ndim
    return resize.node.target, (x, dim, resize.sizes(given, first)), dict(resize.node.kwargs)


def split(resize: Resize) -> Call:
    """x.chunk(n, dim), x.split(size, dim) and their kin become a split into the sizes that are left."""
    dim = resize.args[2] if len(resize.args) > 2 else resize.node.kwargs.get("dim", 0)
    sizes = [shape[resize.value(dim)] for shape in resize.slim]
    target = "split" if resize.node.op == "call_method" else torch.split
    return target, (resize.args[0], sizes, dim), {}


def index(resize: Resize) -> Call:
    """x[:, a:b]: the bounds count what is left before them."""
    x, key = resize.args
    keys = key if isinstance(key, tuple) else (key,)
    full = resize.value(x)
    explicit = sum(item is not None and item is not Ellipsis for item in keys)
    dim, new = 0, []
    for item in keys:
        if item is Ellipsis:
            dim += full.ndim - explicit
        elif isinstance(item, slice):
            new.append(_bounds(item, resize, full, dim))
            dim += 1
            continue
        elif item is not None:
            dim += 1
        new.append(item)
    return resize.node.target, (x, tuple(new)), {}


def _bounds(item: slice, resize: Resize, full: Tensor, dim: int) -> slice:
    kept = resize.kept(full, dim)
    start, stop, step = slice(*map(resize.value, (item.start, item.stop, item.step))).indices(full.shape[dim])
    if bool(kept.all()) or step != 1:
        return item
    return slice(int(kept[:start].sum()), int(kept[:stop].sum()))


def narrow(resize: Resize) -> Call:
    """x.narrow(dim, start, length)."""
    x, dim, start, length = (*resize.args, *resize.node.kwargs.values())
    first, size = resize.value(start), resize.value(length)
    kept = resize.kept(resize.value(x), resize.value(dim))
    bounds = int(kept[:first].sum()), int(kept[first : first + size].sum())
    return resize.node.target, (x, dim, *bounds), {}


def pad(resize: Resize) -> Call:
    """F.pad(x, widths): the channels added are counted as they are left."""
    x, widths, *rest = resize.args
    full, widths = resize.value(x), list(widths)
    for place in range(0, len(widths), 2):
        dim = full.ndim - 1 - place // 2
        before, after = max(resize.value(widths[place]), 0), max(resize.value(widths[place + 1]), 0)
        kept = resize.kept(resize.node.meta["val"], dim)
        if not kept.all():
            widths[place] = int(kept[:before].sum())
            widths[place + 1] = int(kept[len(kept) - after :].sum())
    return resize.node.target, (x, widths, *rest), dict(resize.node.kwargs)


def convolve(resize: Resize) -> Call:
    """F.conv2d(x, weight, ..., groups): as many groups as whole ones are left."""
    args, kwargs = list(resize.args), dict(resize.node.kwargs)
    x, weight = (resize.value(arg) for arg in (args[0], args[1] if len(args) > 1 else kwargs["weight"]))
    groups = int(resize.kept(x, 1).sum()) // weight.shape[1]
    if len(args) > 6:
        args[6] = groups
    else:
        kwargs["groups"] = groups
    return resize.node.target, tuple(args), kwargs


FAMILIES: dict[Any, Callable[[Resize], Call]] = {
    **dict.fromkeys(["view", "reshape", "expand", torch.reshape, "new_zeros", "new_ones", "new_empty"], reshape),
    **dict.fromkeys(["unflatten", torch.unflatten], unflatten),
    **dict.fromkeys(["chunk", "split", "split_with_sizes", "tensor_split", "unsafe_chunk", "unsafe_split"], split),
    **dict.fromkeys([torch.chunk, torch.split, torch.split_with_sizes, torch.tensor_split], split),
    **dict.fromkeys([operator.getitem], index),
    **dict.fromkeys(["narrow", torch.narrow], narrow),
    **dict.fromkeys([F.pad, torch.nn.functional.pad, torch.constant_pad_nd], pad),
    **dict.fromkeys([F.conv1d, F.conv2d, F.conv3d, torch.conv1d, torch.conv2d, torch.conv3d], convolve),
}
"""The family of a traced call, by its function or its method's name."""
