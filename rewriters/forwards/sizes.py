"""Calls that hold a size: how to write each family of them for the sizes that are left.

A function here takes a traced node and what is known of the slimmed values around it, and returns the node's new
target, arguments and keyword arguments. It only has to be right if the call as it is isn't: `resizing.py` tries that
first, and checks the result.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from rewriters.forwards.attribute_reads import follows_input

Call = tuple[Any, tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Scaled:
    """A size that is an expression (batch times heads) and has to be another number for the sizes that are left.

    Attributes:
        size: the expression; it may give several sizes in a tuple.
        value: the number that it has to be, or a tuple of these.
        left: the number that the expression gives now, or a tuple of these.
    """

    size: fx.Node
    value: Any
    left: Any


def scaled(size: Any, value: Any, left: Any) -> Any:
    """What an expression would be before slimming, where `value` has become `left`: a `Scaled` size, a factor."""
    if isinstance(size, tuple):
        return tuple(scaled(*one) for one in zip(size, value, left, strict=True))
    if isinstance(value, float):
        return size * (value / left)
    return size * value // left if left else value


def in_lowest_terms(value: Any, left: Any) -> tuple[Any, Any]:
    """Both numbers of a `Scaled` size without their common factors, so that examples of all sizes give one code."""
    if isinstance(value, tuple):
        pairs = [in_lowest_terms(*pair) for pair in zip(value, left, strict=True)]
        return tuple(first for first, _ in pairs), tuple(second for _, second in pairs)
    common = math.gcd(value, left) if isinstance(value, int) and left else 1
    return (value // common, left // common) if common > 1 else (value, left)


@dataclass(frozen=True)
class Resize:
    """What a family needs to know about a call.

    Attributes:
        node: the traced call.
        full: full shapes of the tensors among its results, in order.
        slim: their shapes after slimming.
        kept: (value, dim) -> which indices of a full tensor stay along a dimension, bool of shape (size,).
        left: argument -> its value after slimming, if the call is not changed.
    """

    node: fx.Node
    full: list[tuple[int, ...]]
    slim: list[tuple[int, ...]]
    kept: Callable[[Tensor, int], Tensor]
    left: Callable[[Any], Any]

    def argument(self, index: int, *names: str, default: Any = None) -> Any:
        """An argument by position or by one of its names."""
        if len(self.node.args) > index:
            return self.node.args[index]
        return next((self.node.kwargs[name] for name in names if name in self.node.kwargs), default)

    @property
    def x(self) -> Any:
        """The tensor that the call works on."""
        return self.argument(0, "input", "self", "tensor")

    def value(self, arg: Any) -> Any:
        """The value that an argument had when it was traced."""
        return fx.node.map_arg(arg, lambda node: node.meta["val"])

    def size(self, given: Any, value: int) -> Any:
        """A size as it is written, unless it has to have another value now."""
        left = self.left(given)
        if left in (value, -1):
            return given
        scales = isinstance(given, fx.Node) and isinstance(left, int) and left and follows_input(given)
        return Scaled(given, value, left) if scales else value

    def are_sizes(self, given: Any) -> bool:
        """Whether an argument is several sizes, written in a list or computed as a tuple (`x.shape[:-1] + (4, 8)`)."""
        return isinstance(given, (tuple, list)) or isinstance(self.value(given), tuple)

    def sizes(self, given: Any, offset: int = 0) -> Any:
        """Sizes as they are written; those that have to have another value now are replaced."""
        if isinstance(given, fx.Node):
            left = tuple(self.left(given))
            slim = zip(left, self.slim[0][offset:], strict=False)
            value = tuple(size if size == -1 else needed for size, needed in slim)
            return given if value == left else Scaled(given, value, left)
        return [self.size(size, value) for size, value in zip(given, self.slim[0][offset:], strict=False)]

    def with_args(self, *args: Any, **kwargs: Any) -> Call:
        """The call with other positional arguments, or with changed keyword arguments."""
        return self.node.target, args or tuple(self.node.args), {**self.node.kwargs, **kwargs}


def reshape(resize: Resize) -> Call:
    """x.view(sizes), x.reshape(sizes), torch.reshape(x, sizes), x.expand(sizes)."""
    given = resize.node.args[1:]
    if not given:
        name = next(name for name in ("size", "shape") if name in resize.node.kwargs)
        return resize.with_args(**{name: resize.sizes(resize.node.kwargs[name])})
    if resize.are_sizes(given[0]):
        return resize.with_args(resize.x, resize.sizes(given[0]))
    return resize.with_args(resize.x, *resize.sizes(given))


def repeat(resize: Resize) -> Call:
    """x.repeat(times), x.repeat_interleave(times, dim): one element is repeated as often as indices are left."""
    one = {dim for dim, size in enumerate(reversed(resize.value(resize.x).shape), 1) if size == 1}
    left = {dim: size for dim, size in enumerate(reversed(resize.slim[0]), 1) if dim in one}
    if resize.node.target in _INTERLEAVED:
        times, dim = (resize.argument(i, name) for i, name in ((1, "repeats"), (2, "dim")))
        if dim is None:  # the flattened tensor
            return resize.with_args()
        behind = len(resize.full[0]) - resize.value(dim) % len(resize.full[0])
        return resize.node.target, (resize.x, resize.size(times, left[behind]) if behind in left else times, dim), {}
    given = resize.argument(1, "repeats")
    times = list(given) if isinstance(given, (tuple, list)) else list(resize.node.args[1:])
    places = range(len(times), 0, -1)
    sizes = [resize.size(size, left[dim]) if dim in left else size for size, dim in zip(times, places, strict=True)]
    return "repeat", (resize.x, sizes), {}


_INTERLEAVED = ("repeat_interleave", torch.repeat_interleave)


def create(resize: Resize) -> Call:
    """torch.zeros(sizes), torch.zeros(*sizes), torch.full(sizes, value), x.new_zeros(sizes) and similar calls."""
    owner = resize.node.args[:1] if resize.node.op == "call_method" else ()
    given = resize.node.args[len(owner) :]
    if not given:
        return resize.with_args(*owner, size=resize.sizes(resize.node.kwargs["size"]))
    if resize.are_sizes(given[0]):
        return resize.with_args(*owner, resize.sizes(given[0]), *given[1:])
    return resize.with_args(*owner, *resize.sizes(given))


def unflatten(resize: Resize) -> Call:
    """x.unflatten(dim, sizes)."""
    dim, given = resize.argument(1, "dim"), resize.argument(2, "sizes")
    first = resize.value(dim) % resize.value(resize.x).ndim
    return resize.node.target, (resize.x, dim, resize.sizes(given, first)), {}


def split(resize: Resize) -> Call:
    """x.chunk(n, dim), x.split(size, dim) and similar calls become a split into the sizes that are left."""
    dim = resize.argument(2, "dim", default=0)
    sizes = [shape[resize.value(dim)] for shape in resize.slim]
    target = "split" if resize.node.op == "call_method" else torch.split
    return target, (resize.x, sizes, dim), {}


def index(resize: Resize) -> Call:
    """x[:, a:b]: the new bounds are the numbers of indices left before them."""
    x, key = resize.node.args
    keys = key if isinstance(key, tuple) else (key,)
    full = resize.value(x)
    explicit = sum(item is not None and item is not Ellipsis for item in keys)
    dim = 0
    new: list[Any] = []
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
    dim = resize.argument(1, "dim")
    start, length = resize.value(resize.argument(2, "start")), resize.value(resize.argument(3, "length"))
    kept = resize.kept(resize.value(resize.x), resize.value(dim))
    start %= len(kept)
    bounds = int(kept[:start].sum()), int(kept[start : start + length].sum())
    return resize.node.target, (resize.x, dim, *bounds), {}


def pad(resize: Resize) -> Call:
    """F.pad(x, widths): the new widths are the numbers of added, or removed, channels that are left."""
    full, widths = resize.value(resize.x), list(resize.argument(1, "pad"))
    for place, given in enumerate(resize.value(widths)):
        dim = full.ndim - 1 - place // 2
        whole = full if given < 0 else resize.node.meta["val"]
        kept = resize.kept(whole, dim)
        border = kept[: abs(given)] if place % 2 == 0 else kept[len(kept) - abs(given) :]
        if not border.all():
            widths[place] = int(border.sum()) * (-1 if given < 0 else 1)
    if "pad" in resize.node.kwargs:
        return resize.with_args(pad=widths)
    return resize.with_args(resize.x, widths, *resize.node.args[2:])


def roll(resize: Resize) -> Call:
    """x.roll(shifts, dims): the new shift is the number of indices left among those that come round to the front."""
    shifts, dims = (resize.argument(i, name) for i, name in ((1, "shifts"), (2, "dims")))
    if dims is None:  # the flattened tensor: how many come round depends on every size
        return resize.with_args()
    shifts, dims = (list(item) if isinstance(item, (tuple, list)) else [item] for item in (shifts, dims))
    for place, (shift, dim) in enumerate(zip(resize.value(shifts), resize.value(dims), strict=True)):
        kept = resize.kept(resize.value(resize.x), dim)
        if not kept.all():
            shifts[place] = int(kept[len(kept) - shift % len(kept) :].sum())
    return resize.node.target, (resize.x, shifts, dims), {}


def channel_shuffle(resize: Resize) -> Call:
    """F.channel_shuffle(x, groups): the number of groups that are left, all of which have equally many channels."""
    groups = resize.value(resize.argument(1, "groups"))
    left = resize.kept(resize.value(resize.x), 1).view(groups, -1).any(1)
    return resize.node.target, (resize.x, int(left.sum())), {}


def convolve(resize: Resize) -> Call:
    """F.conv2d(x, weight, ..., groups): the number of groups that are left, if whole groups were removed."""
    kept = resize.kept(resize.value(resize.x), 1)
    groups = resize.value(resize.argument(6, "groups", default=1)) * int(kept.sum()) // len(kept)
    if len(resize.node.args) > 6:
        return resize.with_args(*resize.node.args[:6], groups, *resize.node.args[7:])
    return resize.with_args(groups=groups)


def layer_norm(resize: Resize) -> Call:
    """F.layer_norm(x, sizes, ...), F.rms_norm(x, sizes, ...)."""
    given = resize.argument(1, "normalized_shape")
    if isinstance(given, fx.Node):  # a size that was read from a tensor has no other form
        return resize.with_args()
    sizes = resize.sizes(given, len(resize.full[0]) - len(given))
    if len(resize.node.args) > 1:
        return resize.with_args(resize.x, sizes, *resize.node.args[2:])
    return resize.with_args(*resize.node.args, normalized_shape=sizes)


def group_norm(resize: Resize) -> Call:
    """F.group_norm(x, groups, ...): the number of groups that are left, if whole groups were removed."""
    groups = resize.argument(1, "num_groups")
    left = int(resize.kept(resize.value(resize.x), 1).view(resize.value(groups), -1).any(1).sum())
    if left == resize.value(groups):
        left = groups
    if len(resize.node.args) > 1:
        return resize.with_args(resize.x, left, *resize.node.args[2:])
    return resize.with_args(*resize.node.args, num_groups=left)


def attention(resize: Resize) -> Call:
    """F.scaled_dot_product_attention(query, ...): scores are still scaled by the width before slimming."""
    query = resize.argument(0, "query")
    width = resize.value(query).shape[-1]
    given = len(resize.node.args) > 6 or resize.node.kwargs.get("scale") is not None
    if given or resize.left(query).shape[-1] == width:
        return resize.with_args()
    return resize.with_args(scale=width**-0.5)


_CONVOLUTIONS = [
    F.conv1d, F.conv2d, F.conv3d, torch.conv1d, torch.conv2d, torch.conv3d, F.conv_transpose1d, F.conv_transpose2d,
    F.conv_transpose3d, torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d,
]  # fmt: skip

FAMILIES: dict[Any, Callable[[Resize], Call]] = {
    **dict.fromkeys(["view", "reshape", torch.reshape, "expand"], reshape),
    **dict.fromkeys(["repeat", *_INTERLEAVED], repeat),
    **dict.fromkeys(["new_zeros", "new_ones", "new_empty", "new_full"], create),
    **dict.fromkeys([torch.zeros, torch.ones, torch.full, torch.empty], create),
    **dict.fromkeys(["unflatten", torch.unflatten], unflatten),
    **dict.fromkeys(["chunk", "split", "split_with_sizes", "tensor_split", "unsafe_chunk", "unsafe_split"], split),
    **dict.fromkeys([torch.chunk, torch.split, torch.split_with_sizes, torch.tensor_split], split),
    **dict.fromkeys([operator.getitem], index),
    **dict.fromkeys(["narrow", torch.narrow], narrow),
    **dict.fromkeys([F.pad, torch.nn.functional.pad, torch.constant_pad_nd], pad),
    **dict.fromkeys(["roll", torch.roll], roll),
    **dict.fromkeys([F.channel_shuffle, torch.channel_shuffle], channel_shuffle),
    **dict.fromkeys(_CONVOLUTIONS, convolve),
    **dict.fromkeys([F.layer_norm, torch.layer_norm, F.rms_norm, torch.rms_norm], layer_norm),
    F.group_norm: group_norm,
    F.scaled_dot_product_attention: attention,
}
"""The family of a traced call, by its function or method name."""
