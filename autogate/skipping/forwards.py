"""Forwards of convolutions that skip what is off: they shadow the convolutions' own, on the instances.

Rows of the kernel are gathered for the channels that are on, and columns for the input channels that aren't zero. What
is off stays zero in an output of the full shape, so the model's own code runs as it is. A batch norm behind the
convolution, and the scale by the score, are part of the gathered kernel. In train mode, where gradients are wanted, and
where a model is traced, compiled or exported, the convolution and its norm run whole, and the rest is multiplied by
zero.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autogate.saliency import CountedLayer, FollowingModule, SaliencyModule, broadcast
from autogate.skipping.break_even import ALL, BreakEven
from autogate.skipping.folding import PassingNorm

CONVOLUTIONS: dict[type[nn.Module], Callable[..., Tensor]] = {
    nn.Conv1d: F.conv1d, nn.Conv2d: F.conv2d, nn.Conv3d: F.conv3d,
}  # fmt: skip
"""What can be gathered. Classes derived from these may do more than their base."""


class Group(NamedTuple):
    """Images of a batch for which a layer computes the same channels.

    Attributes:
        images: their indices; None for all of the batch.
        on: the channels that are computed; None for all.
        read: the input channels that are read; None for all.
    """

    images: Tensor | None
    on: Tensor | None
    read: Tensor | None


class SkippingForward:
    """The forward of a convolution that has a saliency module.

    Args:
        conv: the convolution.
        module: its saliency module.
        layer: the classes of its channels.
        stays: bool, shape (classes + 1,): the classes that may be other than zero before any layer has made them.
        norm: the batch norm behind it, where that is scaled; None for another one or none.
        at_once: whether its output is scaled where `norm` is, or, without one, by itself: no code lies in between.

    Attributes:
        follows: whether it is a depthwise convolution.
        break_even: how much must be off for it to be skipped; None if nothing is.
    """

    def __init__(
        self, conv: Any, module: SaliencyModule | FollowingModule, layer: CountedLayer, stays: Tensor,
        norm: PassingNorm | None, at_once: bool,
    ):  # fmt: skip
        self.conv, self.module, self.norm, self.at_once = conv, module, norm, at_once
        self._earlier = conv.__dict__.get("forward")
        self._function = None if self._earlier else CONVOLUTIONS.get(type(conv))
        self.follows = isinstance(module, FollowingModule)
        self._inputs, self._outputs = (classes.remainder(len(stays)) for classes in (layer.inputs, layer.outputs))
        self._stays = stays.int()
        self.break_even: BreakEven | None = None

    @property
    def can_skip(self) -> bool:
        """Whether the convolution is one that can be gathered."""
        return self._function is not None and self.conv.padding_mode == "zeros"

    def __call__(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        notes = self.module.notes
        if torch.compiler.is_compiling() or torch.jit.is_tracing() or type(input) is not Tensor:
            notes.untold = True
            return self._whole(input, *args, **kwargs)
        read = self._follow(input.shape[0]) if input.ndim == self.module.dims + 2 else None
        if read is None:
            notes.untold = True
        if self.break_even is None or self.conv.training or torch.is_grad_enabled() or not self._batched(input):
            return self._whole(input, *args, **kwargs)
        open: Any = self.module.open
        return self._skipped(input, self._groups(open, read, self.break_even))

    def trial(self, input: Tensor, on: float, read: float) -> Tensor:
        """What the layer and its norm take if these shares of its channels are on, and of its input: for timing.

        With all of them on, nothing is gathered.
        """
        code, reads = (torch.arange(size, device=input.device) < max(1, round(share * size))
                       for share, size in ((on, self.conv.out_channels), (read, self.conv.in_channels)))  # fmt: skip
        group, affine = self._group(None, code, reads, ALL), self._affine()
        factor = None if affine is None else affine.new_ones(len(input), affine.shape[1])
        made = self._spread(input, [group], [self._computed(input, group, affine, factor)])
        if self.norm is not None:
            self.norm.done = affine is not None
            made = self.norm(made)
        return made if affine is not None else made * 1.0

    def _whole(self, *args: Any, **kwargs: Any) -> Tensor:
        if self._earlier is not None:
            return self._earlier(*args, **kwargs)
        return type(self.conv).forward(self.conv, *args, **kwargs)

    def _batched(self, input: Tensor) -> bool:
        return input.ndim == self.module.dims + 2 and input.shape[0] > 0

    def _follow(self, images: int) -> Tensor | None:
        """Note which classes are made; returns 0 for input channels that are zero, shape (images, channels).

        None if that isn't known: the layer runs outside of the model's forward, or sees other rows than images.
        """
        notes, open = self.module.notes, self.module.open
        if not notes.running or notes.untold:
            return None
        assert open is not None
        if self._stays.device != open.device:
            self._stays, self._inputs, self._outputs = (
                one.to(open.device) for one in (self._stays, self._inputs, self._outputs)
            )
        if notes.alive is None:
            notes.alive = self._stays.repeat(images, 1)
        if notes.alive.shape[0] != images:
            return None
        read = notes.alive.index_select(1, self._inputs)
        notes.alive.index_add_(1, self._outputs, open.int())  # a class may be there several times
        return read

    def _groups(self, open: Tensor, read: Tensor | None, break_even: BreakEven) -> list[Group]:
        if open.shape[0] == 1:
            return [self._group(None, open[0], None if read is None else read[0], break_even)]
        if self.module.notes.allowed is not None:
            return [self._group(None, open.any(0), None if read is None else read.any(0), break_even)]
        codes, of = torch.unique(open, dim=0, return_inverse=True)
        if len(codes) == 1:
            return [self._group(None, codes[0], None if read is None else read.any(0), break_even)]
        if open.device.type != "cpu":  # there a batch at once is faster than one image after the other
            return [Group(None, None, None)]
        found, whole = [], []
        for number, code in enumerate(codes):
            images = (of == number).nonzero().flatten()
            group = self._group(images, code, None if read is None else read[images].any(0), break_even)
            if group.on is None:
                whole.append(images)
            else:
                found.append(group)
        if not found:
            return [Group(None, None, None)]
        return found + ([Group(torch.cat(whole), None, None)] if whole else [])

    def _group(self, images: Tensor | None, code: Tensor, read: Tensor | None, break_even: BreakEven) -> Group:
        """What is gathered for images with this code; everything is computed where that is as fast."""
        on = code.nonzero().flatten()
        work, columns = on.shape[0] / code.shape[0], None
        if read is not None and not self.follows:
            found, channels = read.nonzero().flatten(), read.shape[0]
            if found.shape[0] < channels and found.shape[0] <= break_even.columns * channels:
                work, columns = work * found.shape[0] / channels, found
        if work >= 1 or work > break_even.work:
            return Group(images, None, None)
        return Group(images, _at_least_one(on), None if columns is None else _at_least_one(columns))

    def _skipped(self, input: Tensor, groups: list[Group]) -> Tensor:
        affine, factor = self._affine(), None
        if affine is not None:
            found: Any = self.module.open if self.follows else self.module.factor
            factor = found.to(affine.dtype)
        made = [self._computed(input, group, affine, factor) for group in groups]
        if affine is not None:
            self._tell_done()
        return self._spread(input, groups, made)

    def _affine(self) -> Tensor | None:
        """Scale and shift of the convolution's output, its bias included, shape (2, channels); None: not done here."""
        conv, norm = self.conv, self.norm
        if not self.at_once or (norm is not None and not norm.folds):
            return None
        if any(getattr(hook, "__self__", None) is not self.module for hook in conv._forward_hooks.values()):
            return None  # a hook of the user's wants to see the convolution's own output
        affine = conv.weight.new_tensor([[1.0], [0.0]]).repeat(1, conv.out_channels) if norm is None else norm.affine()
        return affine if conv.bias is None else torch.stack([affine[0], affine[1] + affine[0] * conv.bias])

    def _computed(self, input: Tensor, group: Group, affine: Tensor | None, factor: Tensor | None) -> Tensor:
        """The channels of a group that are on, shape (its images, channels that are on, ...)."""
        conv = self.conv
        x = _taken(_taken(input, 0, group.images), 1, group.on if self.follows else group.read)
        kernel = _taken(conv.weight, 0, group.on)
        kernel = kernel if self.follows else _taken(kernel, 1, group.read)
        if affine is None:
            return self._run(x, kernel, None if conv.bias is None else _taken(conv.bias, 0, group.on))
        assert factor is not None
        factor = _taken(_taken(factor, 0, group.images), 1, group.on)
        scale, shift = (_taken(affine, 1, group.on)[:, None] * factor).to(x.dtype)
        if x.shape[0] == 1 and kernel[0].numel() < prod(x.shape[2:]):
            return self._run(x, kernel * broadcast(scale[0], kernel.ndim - 1), shift[0])
        made = self._run(x, kernel, None)
        scale, shift = broadcast(scale, self.module.dims), broadcast(shift, self.module.dims)
        return torch.addcmul(shift, made, scale, out=made)

    def _run(self, x: Tensor, kernel: Tensor, bias: Tensor | None) -> Tensor:
        conv = self.conv
        assert self._function is not None
        groups = len(kernel) if self.follows else 1
        return self._function(x, kernel, bias, conv.stride, conv.padding, conv.dilation, groups)

    def _tell_done(self) -> None:
        if self.norm is not None:
            self.norm.done = True
        if isinstance(self.module, FollowingModule):
            self.module.done = True
        else:
            self.module.factor = None

    def _spread(self, input: Tensor, groups: list[Group], made: list[Tensor]) -> Tensor:
        """The output of the whole batch, zero where channels are off."""
        outputs, first = self.conv.out_channels, made[0]
        if groups[0].images is None:
            return first if groups[0].on is None else spread(first, groups[0].on, outputs)
        out = first.new_zeros(len(input), outputs, *first.shape[2:])
        for group, y in zip(groups, made, strict=True):
            assert group.images is not None
            if group.on is None:
                out.index_copy_(0, group.images, y)
            elif len(y) == 1:
                out[int(group.images)].index_copy_(0, group.on, y[0])
            else:
                out[group.images[:, None], group.on] = y
        return out


def spread(x: Tensor, on: Tensor, channels: int) -> Tensor:
    """A feature map with all channels, from those that are on; the others are zero."""
    return x.new_zeros(x.shape[0], channels, *x.shape[2:]).index_add_(1, on, x)


def _taken(x: Tensor, dim: int, index: Tensor | None) -> Tensor:
    return x if index is None else x.index_select(dim, index)


def _at_least_one(index: Tensor) -> Tensor:
    """The index, or the first channel: it is multiplied by zero, or is zero."""
    return index if index.shape[0] else index.new_zeros(1)
