"""Forwards of convolutions and linear layers that skip what is off: they shadow the layers' own, on the instances.

Rows of the kernel are gathered for the channels that are on, and columns for the input channels that aren't zero. What
is off stays zero in an output of the full shape, so the model's own code runs as it is. A batch norm behind the
layer, and the scale by the score, are part of the gathered kernel. In train mode, where gradients are wanted, and where
a model is traced, compiled or exported, the layer and its norm run whole, and the rest is multiplied by zero.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autogate.saliency import CountedLayer, FollowingModule, Notes, SaliencyModule, layout_of
from autogate.skipping.break_even import ALL, BreakEven
from autogate.skipping.folding import PassingNorm
from autogate.skipping.links import Link

FUNCTIONS: dict[type[nn.Module], Callable[..., Tensor]] = {
    nn.Conv1d: F.conv1d, nn.Conv2d: F.conv2d, nn.Conv3d: F.conv3d, nn.Linear: F.linear,
}  # fmt: skip
"""What can be gathered. Classes derived from these may do more than their base."""


class Group(NamedTuple):
    """Images of a batch for which a layer computes the same channels.

    Attributes:
        images: their indices; None for all of the batch.
        on: the channels that are computed; None for all.
        read: the input channels that are read; None for all.
        alike: whether all images have just these channels: then none of them is off.
    """

    images: Tensor | None
    on: Tensor | None
    read: Tensor | None
    alike: bool = False


class SkippingForward:
    """The forward of a layer that has a saliency module, or reads channels of such layers.

    Args:
        conv: the convolution or linear layer.
        module: its saliency module; None if it only reads: then it computes all of its outputs.
        layer: the classes of its channels.
        notes: take the calls of each forward.
        stays: bool, shape (classes + 1,): the classes that may be other than zero before any layer has made them.
        norm: the batch norm behind it, where that is scaled; None for another one or none.
        at_once: whether its output is scaled where `norm` is, or, without one, by itself: no code lies in between.
        link: to the layers that it reads from, and that read from it.

    Attributes:
        rows, columns: whether rows or columns of its kernel can be gathered: a layer that only reads computes all
            rows, and a depthwise convolution has no columns.
        break_even: how much must be off for it to be skipped; None if nothing is.
    """

    def __init__(
        self, conv: Any, module: SaliencyModule | FollowingModule | None, layer: CountedLayer, notes: Notes,
        stays: Tensor, norm: PassingNorm | None, at_once: bool, link: Link,
    ):  # fmt: skip
        self.conv, self.module, self.notes, self.norm, self.at_once = conv, module, notes, norm, at_once
        self._earlier = conv.__dict__.get("forward")
        self._function = None if self._earlier else FUNCTIONS.get(type(conv))
        self.rows, self.columns = module is not None, layer.groups == 1
        self._layout = layout_of(conv)
        self._inputs, self._outputs = (classes.remainder(len(stays)) for classes in (layer.inputs, layer.outputs))
        self._stays = stays.int()
        self._link = link
        self.break_even: BreakEven | None = None

    @property
    def can_skip(self) -> bool:
        """Whether the layer is one that can be gathered."""
        return self._function is not None and getattr(self.conv, "padding_mode", "zeros") == "zeros"

    def __call__(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if torch.compiler.is_compiling() or torch.jit.is_tracing() or type(input) is not Tensor:
            self.notes.untold = True
            return self._whole(input, *args, **kwargs)
        batched = self._batched(input)
        code: Any = self.module.open if self.module is not None and batched else None
        on = _index(code[0]) if code is not None and code.shape[0] == 1 else None
        read = self._follow(input, code, on) if batched else None
        if read is None:
            self.notes.untold = True
        if (
            self.break_even is None
            or self.conv.training
            or torch.is_grad_enabled()
            or not batched
            or not input.shape[0]
        ):
            return self._whole(input, *args, **kwargs)
        return self._skipped(input, self._groups(code, on, read, self.break_even))

    def trial(self, input: Tensor, on: float, read: float) -> Tensor:
        """What the layer and its norm take if these shares of its channels are on, and of its input: for timing.

        With all of them on, nothing is gathered.
        """
        rows, columns = (torch.arange(max(1, round(share * size)), device=input.device)
                         for share, size in ((on, len(self._outputs)), (read, len(self._inputs))))  # fmt: skip
        group, affine = self._group(None, rows, columns, ALL), self._affine(input)
        factor = None if affine is None else affine.new_ones(len(input), len(self._outputs))
        made = self._spread(input, [group], [self._computed(input, group, affine, factor)])
        if self.norm is not None:
            self.norm.done = affine is not None
            made = self.norm(made)
        return made if affine is not None or not self.rows else made * 1.0

    def _whole(self, *args: Any, **kwargs: Any) -> Tensor:
        if self._earlier is not None:
            return self._earlier(*args, **kwargs)
        return type(self.conv).forward(self.conv, *args, **kwargs)

    def _batched(self, input: Tensor) -> bool:
        return input.ndim >= 2 if self._layout.dims is None else input.ndim == self._layout.dims + 2

    def _follow(self, input: Tensor, code: Tensor | None, on: Tensor | None) -> Tensor | None:
        """Note which channels are made. Returns the input channels that aren't zero.

        They are indices, or, of several images, (images, channels): 0 where a channel is zero. None if that isn't
        known: the layer runs outside of the model's forward, or sees other rows than images.
        """
        notes, images = self.notes, input.shape[0]
        if not notes.running or notes.untold:
            return None
        direct = self._link.direct and on is not None and notes.allowed is None
        read = notes.chosen.get(self._link.source)
        if read is None or not direct:
            alive = self._alive(input)
            if alive.shape[0] != images:
                return None
            if read is None:
                read = alive.index_select(1, self._inputs)
                read = _index(read[0]) if images == 1 else read
            if code is not None and not direct:
                alive.index_add_(1, self._outputs, code.int())  # a class may be there several times
        if direct:
            assert on is not None
            before = notes.chosen.get(self._link.number)
            notes.chosen[self._link.number] = on if before is None else torch.cat([before, on]).unique()
        return read

    def _alive(self, input: Tensor) -> Tensor:
        if self._stays.device != input.device:
            self._stays, self._inputs, self._outputs = (
                one.to(input.device) for one in (self._stays, self._inputs, self._outputs)
            )
        if self.notes.alive is None:
            self.notes.alive = self._stays.repeat(input.shape[0], 1)
        return self.notes.alive

    def _groups(
        self, code: Tensor | None, on: Tensor | None, read: Tensor | None, break_even: BreakEven
    ) -> list[Group]:
        """The images of a batch that compute the same channels; where all are computed, those that read the same."""
        if code is None and read is not None and read.ndim == 2:
            code = read > 0
        if code is None or on is not None:
            return [self._group(None, on, read, break_even)]
        if self.notes.allowed is not None:
            return [self._group(None, _index(code.any(0)), read, break_even)._replace(alike=False)]
        codes, of = torch.unique(code, dim=0, return_inverse=True)
        if len(codes) == 1:
            return [self._group(None, _index(codes[0]), read, break_even)]
        if code.device.type != "cpu":  # there a batch at once is faster than one image after the other
            return [Group(None, None, None)]
        found, whole = [], []
        for number, one in enumerate(codes):
            images = (of == number).nonzero().flatten()
            group = self._group(images, _index(one), read, break_even)
            if group.on is None and group.read is None:
                whole.append(images)
            else:
                found.append(group)
        if not found:
            return [Group(None, None, None)]
        return found + ([Group(torch.cat(whole), None, None)] if whole else [])

    def _group(self, images: Tensor | None, on: Tensor | None, read: Tensor | None, break_even: BreakEven) -> Group:
        """What is gathered for images with these channels on; everything is computed where that is as fast.

        Args:
            images: as of a `Group`.
            on: indices.
            read: what `_follow` returns.
            break_even: of the layer.
        """
        outputs, inputs = len(self._outputs), len(self._inputs)
        on = on if self.rows else None
        work, columns = 1.0 if on is None else on.shape[0] / outputs, None
        if read is not None and self.columns:
            found = _index(_taken(read, 0, images).any(0)) if read.ndim == 2 else read
            if found.shape[0] < inputs and found.shape[0] <= break_even.columns * inputs:
                work, columns = work * found.shape[0] / inputs, found
        if work >= 1 or work > break_even.work:
            return Group(images, None, None)
        rows = None if on is None or on.shape[0] == outputs else _at_least_one(on)
        alike = rows is not None and rows is on
        return Group(images, rows, None if columns is None else _at_least_one(columns), alike)

    def _skipped(self, input: Tensor, groups: list[Group]) -> Tensor:
        affine = self._affine(input)
        factors = [None if affine is None else self._factor(group) for group in groups]
        made = [self._computed(input, group, affine, one) for group, one in zip(groups, factors, strict=True)]
        if affine is not None:
            self._tell_done()
        return self._spread(input, groups, made)

    def _affine(self, input: Tensor) -> Tensor | None:
        """Scale and shift of the layer's output, its bias included, shape (2, channels); None: not done here."""
        conv, norm = self.conv, self.norm
        if not self.at_once or (norm is not None and not norm.folds):
            return None
        if norm is not None and self._layout.dims is None and input.ndim > 2:
            return None  # a batch norm takes the second dimension for that of the channels
        if any(getattr(hook, "__self__", None) is not self.module for hook in conv._forward_hooks.values()):
            return None  # a hook of the user's wants to see the layer's own output
        outputs = len(self._outputs)
        affine = conv.weight.new_tensor([[1.0], [0.0]]).repeat(1, outputs) if norm is None else norm.affine()
        return affine if conv.bias is None else torch.stack([affine[0], affine[1] + affine[0] * conv.bias])

    def _computed(self, input: Tensor, group: Group, affine: Tensor | None, factor: Tensor | None) -> Tensor:
        """The channels of a group that are on, of its images, otherwise shaped as the layer's output."""
        conv, layout = self.conv, self._layout
        x = _taken(_taken(input, 0, group.images), layout.channel, group.read if self.columns else group.on)
        kernel = _taken(_taken(conv.weight, 0, group.on), 1, group.read)
        if affine is None or factor is None:
            return self._run(x, kernel, None if conv.bias is None else _taken(conv.bias, 0, group.on))
        factor = _taken(_taken(factor, 0, group.images), 1, group.on)
        affine = _taken(affine, 1, group.on)
        if x.shape[0] > 1:
            affine = affine[:, None]
        scale, shift = (affine * factor).to(x.dtype)
        if x.shape[0] == 1 and kernel[0].numel() < layout.positions(x):
            return self._run(x, kernel * scale.view(-1, *[1] * (kernel.ndim - 1)), shift)
        made = self._run(x, kernel, None)
        return torch.addcmul(layout.broadcast(shift, made), made, layout.broadcast(scale, made), out=made)

    def _factor(self, group: Group) -> Tensor:
        """What the layer's channels are multiplied by, (images, channels); those that aren't computed don't matter."""
        module: Any = self.module
        if not isinstance(module, SaliencyModule):
            return module.open
        return module.pending[0] if group.alike and module.pending is not None else module.factor()

    def _run(self, x: Tensor, kernel: Tensor, bias: Tensor | None) -> Tensor:
        conv = self.conv
        assert self._function is not None
        if self._layout.dims is None:
            return self._function(x, kernel, bias)
        groups = 1 if self.columns else len(kernel)
        return self._function(x, kernel, bias, conv.stride, conv.padding, conv.dilation, groups)

    def _tell_done(self) -> None:
        if self.norm is not None:
            self.norm.done = True
        if isinstance(self.module, FollowingModule):
            self.module.done = True
        elif self.module is not None:
            self.module.pending = None

    def _spread(self, input: Tensor, groups: list[Group], made: list[Tensor]) -> Tensor:
        """The output of the whole batch, zero where channels are off."""
        outputs, first, channel = len(self._outputs), made[0], self._layout.channel
        if groups[0].images is None:
            return first if groups[0].on is None else spread(first, groups[0].on, outputs, channel)
        shape = [len(input), *first.shape[1:]]
        shape[channel] = outputs
        out = first.new_zeros(shape)
        behind = out.movedim(channel, 1)
        for group, y in zip(groups, made, strict=True):
            assert group.images is not None
            if group.on is None:
                out.index_copy_(0, group.images, y)
            elif len(y) == 1:
                out[int(group.images)].index_copy_(channel, group.on, y[0])
            else:
                behind[group.images[:, None], group.on] = y.movedim(channel, 1)
        return out


def spread(x: Tensor, on: Tensor, channels: int, dim: int = 1) -> Tensor:
    """A feature map with all channels along `dim`, from those that are on; the others are zero."""
    shape = list(x.shape)
    shape[dim] = channels
    return x.new_zeros(shape).index_add_(dim, on, x)


def _taken(x: Tensor, dim: int, index: Tensor | None) -> Tensor:
    return x if index is None else x.index_select(dim, index)


def _index(which: Tensor) -> Tensor:
    """The indices at which a vector isn't zero."""
    return which.nonzero().flatten()


def _at_least_one(index: Tensor) -> Tensor:
    """The index, or the first channel: it is multiplied by zero, or is zero."""
    return index if index.shape[0] else index.new_zeros(1)
