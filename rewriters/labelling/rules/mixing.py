"""Ops that mix elements along some dimensions: reductions, softmax, pooling, resizing, norms.

Mixing over channels pins them. Where labels vary along other dimensions too, they are merged along the mixed dimension
instead (split attention's softmax over radix). Statistics don't pin: layer, group and RMS norms, means, variances,
vector norms, extremes and sums are noted (`OpCall.statistic`), wherever they stand, so global response norms and norms
written by hand need no rule. They are taken over the live channels while gates train. What divides a sum stays the
number of channels that there was, because the forward is rewritten. A sum over a kernel is pinned: its column may be
divided by it.

Group norms die by whole groups or by position in the group, as grouped convolutions do.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import prod
from typing import Any

import torch
from torch import Tensor

from rewriters.labelling.channel_map import Side
from rewriters.labelling.labels import Labelled, varying
from rewriters.labelling.rules.elementwise import meet
from rewriters.labelling.rules.registry import OpCall, Result, Zeroed, rule

_POOLED, _NORMED = "pooled along its channels", "normalised over its channels"


@rule(
    "aten.mean", "aten.sum", "aten.amax", "aten.amin", "aten.var", "aten.std", "aten.max.dim", "aten.min.dim",
    "aten.prod", "aten.logsumexp", "aten.linalg_vector_norm", "aten.norm", "aten.any", "aten.all",
    "aten.argmax", "aten.argmin", "aten.var_mean", "aten.std_mean", "aten.max", "aten.min", "aten.aminmax",
    "aten.nansum", "aten.count_nonzero", "aten.median", "aten.nanmedian", "aten.mode", "aten.kthvalue",
)  # fmt: skip
def reduce(call: OpCall) -> Result:
    """A reduction: labels survive along the dimensions that aren't reduced."""
    value, dims = call.args[0], _dim(call)
    dims = [dims] if isinstance(dims, int) else list(dims or range(value.ndim))
    if _is_statistic(call):
        layers, _ = call.statistic(value, dims, "reduced over its channels")
    else:
        layers = call.mix(value, dims, "reduced over its channels")
    if value.source is not None and call.op.overloadpacket in _NORMS:
        sides = (call.space.side_of(layer.flatten()) for layer in layers)
        call.findings.normed.update(side for side in sides if side is not None)
    kept = [dim for dim in range(value.ndim) if dim not in {d % value.ndim for d in dims}] if value.ndim else []
    outs = []
    for shape in call.shapes:
        flat = len(shape) != value.ndim  # keepdim is off
        own = tuple(layer.reshape([layer.shape[d] for d in kept]) for layer in layers) if flat else layers
        outs.append(Labelled(shape, own, value.source, derived=True))
    return outs if len(outs) > 1 else outs[0]


_NORMS = (torch.ops.aten.linalg_vector_norm, torch.ops.aten.norm)


def _dim(call: OpCall) -> Any:
    """The call's `dim` argument, given or by default; None if the op has none."""
    for index, argument in enumerate(call.op._schema.arguments):
        if argument.name == "dim":
            return call.arg(index, "dim", argument.default_value)
    return None


_STATISTICS = {
    torch.ops.aten.mean, torch.ops.aten.var, torch.ops.aten.std, torch.ops.aten.var_mean, torch.ops.aten.std_mean,
    torch.ops.aten.amax, torch.ops.aten.amin,
}  # fmt: skip


_SUMS = {torch.ops.aten.sum, torch.ops.aten.nansum, torch.ops.aten.count_nonzero}

_EXTREMES_WITH_PLACES = {torch.ops.aten.max.dim, torch.ops.aten.min.dim}


def _is_statistic(call: OpCall) -> bool:
    """Whether this reduction over the live channels is what the slim model's own code computes over all it has.

    That holds for a mean, an extreme (not its index), and a sum or norm to which zeros add nothing. A kernel may be
    divided by the sums of its columns, which would be zero for dead ones.
    """
    if call.op in _EXTREMES_WITH_PLACES:
        return 1 in call.unused
    if call.op.overloadpacket in _NORMS:
        power = call.args[1] if len(call.args) > 1 else call.kwargs.get("ord", call.kwargs.get("p"))
        return power is None or power > 0
    if call.op.overloadpacket in _SUMS:
        return call.args[0].source is None
    return call.op.overloadpacket in _STATISTICS


@rule(
    "aten._softmax", "aten._log_softmax", "aten._safe_softmax", "aten.softmax.int", "aten.sort", "aten.topk",
    "aten.cumsum", "aten.cumsum_", "aten.cumprod", "aten.cumprod_", "aten.cummax", "aten.cummin", "aten.logcumsumexp",
    "aten._logcumsumexp",
)  # fmt: skip
def along_one(call: OpCall) -> Result:
    """Each element depends on all along one dimension: normalised, sorted, accumulated."""
    return _mixed_along(call, [_dim(call)])


@rule("aten.tril", "aten.tril_", "aten.triu", "aten.triu_")
def triangle(call: OpCall) -> Result:
    """A triangle of a matrix, which depends on the row and column numbers."""
    return _mixed_along(call, [-2, -1])


def _mixed_along(call: OpCall, dims: Iterable[int], reason: str = "mixed along its channels") -> Result:
    layers = call.mix(call.args[0], dims, reason)
    outs = [Labelled(shape, layers) for shape in call.shapes]
    return outs if len(outs) > 1 else outs[0]


@rule("aten._fft_r2c", "aten._fft_c2r", "aten._fft_c2c")
def fourier(call: OpCall) -> Labelled:
    """A Fourier transform along some dimensions."""
    return Labelled(call.shape, call.mix(call.args[0], call.args[1], "transformed along its channels"))


@rule("aten.im2col")
def unfold(call: OpCall) -> Labelled:
    """Windows of an image, (..., C, H, W) to (..., C x window size, windows), those of a channel side by side."""
    value, window = call.args[:2]
    layers = call.mix(value, [-1, -2], "windows are cut out along it")
    return Labelled(call.shape, tuple(_each_times(layer.flatten(-2), prod(window)) for layer in layers))


def _each_times(layer: Tensor, times: int) -> Tensor:
    return layer.repeat_interleave(times, -2) if layer.shape[-2] > 1 else layer


@rule("aten.col2im")
def fold(call: OpCall) -> Labelled:
    """Windows added up to an image again: `unfold` backwards. All elements of a channel's windows are coupled."""
    value, window = call.args[0], call.args[2]
    layers = []
    for layer in call.mix(value, [-1], "windows are added up along it"):
        if layer.shape[-2] > 1:
            places = layer.unflatten(-2, (-1, prod(window)))
            layer = call.space.merge_along(places, [places.ndim - 2]).squeeze(-2)
        layers.append(layer.unsqueeze(-1))
    return Labelled(call.shape, tuple(layer for layer in layers if varying(layer)))


@rule("aten.view_as_complex", "aten.view_as_real")
def complex_parts(call: OpCall) -> Labelled:
    """A last dimension of size 2 as a complex number, or the other way round."""
    value = call.args[0]
    if len(call.shape) > value.ndim:
        return Labelled(call.shape, tuple(layer.unsqueeze(-1) for layer in value.layers))
    layers = call.mix(value, [-1], "the parts of a complex number")
    return Labelled(call.shape, tuple(layer.squeeze(-1) for layer in layers))


@rule(
    "aten.max_pool2d_with_indices", "aten.avg_pool2d", "aten._adaptive_avg_pool2d", "aten.max_pool2d",
    "aten.adaptive_max_pool2d", "aten.adaptive_avg_pool2d", "aten.upsample_nearest2d",
    "aten._upsample_nearest_exact2d", "aten.upsample_bilinear2d", "aten.upsample_bicubic2d",
    "aten._upsample_bilinear2d_aa", "aten._upsample_bicubic2d_aa", "aten.reflection_pad2d",
    "aten.replication_pad2d",
)  # fmt: skip
def spatial2d(call: OpCall) -> Result:
    """Pooling, resizing and padding of images, which work on each channel alone."""
    return _spatial(call, 2)


@rule("aten.max_pool1d", "aten.avg_pool1d", "aten.adaptive_avg_pool1d", "aten.upsample_nearest1d",
      "aten.upsample_linear1d", "aten.reflection_pad1d", "aten.replication_pad1d",
      "aten.adaptive_max_pool1d")  # fmt: skip
def spatial1d(call: OpCall) -> Result:
    """As `spatial2d`, for sequences."""
    return _spatial(call, 1)


@rule("aten.max_pool3d_with_indices", "aten.avg_pool3d", "aten._adaptive_avg_pool3d", "aten.upsample_nearest3d",
      "aten.upsample_trilinear3d", "aten.adaptive_max_pool3d", "aten.reflection_pad3d",
      "aten.replication_pad3d")  # fmt: skip
def spatial3d(call: OpCall) -> Result:
    """As `spatial2d`, for volumes."""
    return _spatial(call, 3)


@rule("aten.max_unpool2d", "aten.max_unpool3d")
def unpool(call: OpCall) -> Labelled:
    """Pooled values put back at their positions, which each channel has of its own."""
    spatial = len(call.arg(2, "output_size"))
    parts = [
        Labelled((*part.shape[:-spatial], *[1] * spatial), call.mix(part, range(-spatial, 0), _POOLED))
        for part in call.args[:2]
    ]
    return Labelled(call.shape, meet(call, parts))


_WINDOWED = {
    torch.ops.aten.max_pool2d_with_indices, torch.ops.aten.max_pool3d_with_indices, torch.ops.aten.avg_pool2d,
    torch.ops.aten.avg_pool3d,
}  # fmt: skip


def _spatial(call: OpCall, spatial_dims: int) -> Result:
    alone = _pooled_alone(call, spatial_dims)
    return _mixed_along(call, [dim for dim in range(-spatial_dims, 0) if dim not in alone], _POOLED)


def _pooled_alone(call: OpCall, spatial_dims: int) -> set[int]:
    """The dimensions along which each position is pooled alone, as channels are that lie along one of them.

    Where the places of maxima are asked for, their numbers depend on all sizes.
    """
    if call.op.overloadpacket not in _WINDOWED or (len(call.shapes) > 1 and 1 not in call.unused):
        return set()
    kernel = list(call.args[1])
    stride, padding = list(call.arg(2, "stride") or kernel), list(call.arg(3, "padding") or [0])
    windows = zip(*(given * (spatial_dims // len(given)) for given in (kernel, stride, padding)), strict=True)
    return {dim - spatial_dims for dim, window in enumerate(windows) if window == (1, 1, 0)}


@rule("aten.native_batch_norm", "aten.cudnn_batch_norm", "aten.miopen_batch_norm", "aten._batch_norm_no_update",
      "aten._native_batch_norm_legit", "aten._native_batch_norm_legit_no_training",
      "aten._native_batch_norm_legit_functional", "aten._batch_norm_with_update")  # fmt: skip
def batch_norm(call: OpCall) -> Result:
    """Statistics of each channel alone; the norm's own vectors are coupled with the channels."""
    value = call.args[0]
    if value.source is not None:
        return _standardised(call)
    vectors = [arg for arg in call.args[1:5] if isinstance(arg, Labelled)]
    along = [1, value.shape[1], *[1] * (value.ndim - 2)]
    across = [dim for dim in range(value.ndim) if dim != 1]
    layers = call.mix(value, across, _NORMED)
    riders = [_along(vector, along) for vector in vectors]
    layers = meet(call, [Labelled((1, *value.shape[1:]), layers), *riders]) if value.shape[1] > 1 else layers
    return [Labelled(shape, layers if index == 0 else ()) for index, shape in enumerate(call.shapes)]


def _standardised(call: OpCall) -> Result:
    """A kernel of shape (1, O, -1), each output channel of which is normalised by its own mean and variance.

    Qiao et al., "Micro-Batch Training with Batch-Channel Normalization and Weight Standardization", section 3.
    """
    value = call.args[0]
    vectors = [arg for arg in call.args[1:5] if isinstance(arg, Labelled)]
    riders = [_along(vector, [1, value.shape[1], *[1] * (value.ndim - 2)]) for vector in vectors]
    across = [dim for dim in range(value.ndim) if dim != 1]
    layers, along = call.statistic(value, across, _NORMED)
    for layer in along:
        if len(layer.unique()) == layer.numel():  # torch refuses to standardise a single number
            call.pin(layer.flatten()[:2], "a standardised kernel needs two inputs")
    layers = meet(call, [*riders, Labelled(call.shape, (*layers, *along))])
    return [
        Labelled(shape, layers if index == 0 else (), value.source if index == 0 else None, derived=index == 0)
        for index, shape in enumerate(call.shapes)
    ]


@rule("aten.renorm", "aten.renorm_")
def renorm(call: OpCall) -> Result:
    """Slices along one dimension, those scaled down whose norm is too large. Zeros add nothing to a norm."""
    value, power, keep = call.args[:3]
    dims = [dim for dim in range(value.ndim) if dim != keep % value.ndim]
    if value.source is not None or power <= 0:
        return _mixed_along(call, dims, _NORMED)
    layers, along = call.statistic(value, dims, _NORMED)
    return Labelled(call.shape, (*layers, *along))


@rule("aten._weight_norm_interface")
def weight_norm(call: OpCall) -> Result:
    """v * g / norm(v), with the norm over all dimensions but one; columns of zeros add nothing to it.

    Along that one dimension a gate would change nothing until it is zero, where the norm is zero too. If it is one of
    the positions (wav2vec 2.0), the norm includes the outputs, on which no gate stands: it is taken over the live ones.

    Salimans and Kingma, "Weight Normalization", section 2.
    """
    v, g = call.args[:2]
    keep = call.arg(2, "dim", 0) % v.ndim
    if v.source is not None:
        call.findings.normed.add(Side(v.source, keep))
    for layer in v.layers:
        if varying(layer) != (keep,):
            if varying(layer) == (0,) and keep > 1:
                call.note_statistic(layer.flatten(), -v.ndim, _NORMED)
            else:
                call.findings.zeroed.append(Zeroed(layer.flatten(), call.module, str(call.op)))
            call.pin(layer.flatten()[:1], "a kernel of zeros has no norm to divide by")
    return [
        Labelled(v.shape, meet(call, [g, v]), v.source, derived=v.derived),
        *[Labelled(shape) for shape in call.shapes[1:]],
    ]


def _along(vector: Labelled, shape: list[int]) -> Labelled:
    return Labelled(tuple(shape), tuple(layer.reshape(shape) for layer in vector.layers))


@rule("aten.native_layer_norm", "aten._fused_rms_norm", "aten.rms_norm")
def layer_norm(call: OpCall) -> Result:
    """Normalised over the trailing dimensions; if channels are among them, over the live ones."""
    value = call.args[0]
    dims = range(-len(call.args[1]), 0)
    layers, along = call.statistic(value, dims, _NORMED)
    vectors = [arg for arg in call.args[1:] if isinstance(arg, Labelled)]
    return _normalised(call, layers, along, vectors)


@rule("aten.native_group_norm")
def group_norm(call: OpCall) -> Result:
    """Normalised over the channels of a group and all dimensions behind them.

    As in a grouped convolution, whole groups die if there are at least as many groups as channels in one. Otherwise the
    same positions of every group die, and statistics are taken over the live positions.
    """
    value, groups = call.args[0], call.args[6]
    vectors = [arg for arg in call.args[1:3] if isinstance(arg, Labelled)]
    channels = value.layer(1)
    if not call.findings.live or channels is None or len(varying(channels)) > 1:
        return _normalised(call, call.mix(value, range(1, value.ndim), _NORMED), (), vectors)
    width = value.shape[1] // groups
    by_group = channels.view(groups, width)
    if normalises_whole_groups(groups, value.shape[1]):
        call.space.merge_along(by_group, [1])
    else:
        call.note_statistic(call.space.merge_along(by_group, [0]).flatten(), 1 - value.ndim, _NORMED)
    rest = tuple(layer for layer in value.layers if layer is not channels)
    layers = call.mix(Labelled(value.shape, rest), range(1, value.ndim), _NORMED)
    shape = [value.shape[1], *[1] * (value.ndim - 2)]
    return _normalised(call, layers, (channels,), [_along(vector, shape) for vector in vectors])


def normalises_whole_groups(groups: int, channels: int) -> bool:
    """Whether a group norm loses whole groups."""
    return groups * groups >= channels


def _normalised(
    call: OpCall, layers: tuple[Tensor, ...], along: tuple[Tensor, ...], vectors: list[Labelled]
) -> list[Labelled]:
    """A norm's results: its vectors are coupled with the channels, or pinned if these are."""
    if along:
        layers = meet(call, [Labelled(call.shape, (*layers, *along)), *vectors])
    else:
        for layer in (layer for vector in vectors for layer in vector.layers):
            call.pin(layer, _NORMED)
    return [Labelled(shape, layers if index == 0 else ()) for index, shape in enumerate(call.shapes)]
