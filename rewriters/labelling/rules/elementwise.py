"""Ops that work element by element: labels that meet are merged.

Where one operand varies along more dimensions than the other, the merge may have to wait until all labels have met
(`DeferredMerge`, see `settling.py`).

An elementwise op may also compute a kernel from a parameter. The result then knows that parameter (`Labelled.source`),
and whether zeros in the one are zeros in the other (`derived` if they aren't): a kernel that is scaled needs no mask.
"""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from rewriters.labelling.labels import Labelled, varying
from rewriters.labelling.rules.registry import RULES, DeferredMerge, OpCall, rule


@rule(
    # All ops tagged pointwise come here by themselves. These are elementwise too, but not tagged.
    "aten._to_copy", "aten.clone", "aten.detach", "aten.alias", "aten.lift_fresh", "aten.lift_fresh_copy",
    "aten.contiguous", "aten.copy_", "aten.copy", "aten.native_dropout", "aten.bernoulli_", "aten.bernoulli",
    "aten.masked_fill", "aten.masked_fill_", "aten.where", "aten.fill_", "aten.zero_", "aten.hardswish",
    "aten.hardswish_", "aten.mish_", "aten.gelu_", "aten._prelu_kernel", "aten.log_sigmoid_forward",
    "aten.rsub", "aten.threshold_", "aten.zeros_like", "aten.ones_like", "aten.empty_like", "aten.full_like",
    "aten.rand_like", "aten.randn_like", "aten.complex", "aten.polar", "aten._conj", "aten._neg_view",
    "aten.rrelu_with_noise", "aten.rrelu_with_noise_", "aten.fake_quantize_per_tensor_affine",
    "aten.fake_quantize_per_tensor_affine_cachemask",
    "aten._fake_quantize_per_tensor_affine_cachemask_tensor_qparams",
)  # fmt: skip
def elementwise(call: OpCall) -> Labelled | list[Labelled]:
    """y[i] depends on x[i] alone (add, relu, sigmoid, mul, dropout, copies ...)."""
    operands = list(call.tensors())
    kernel = _kernel_among(call, operands)
    if kernel is None:
        out = Labelled(call.shape, meet(call, operands, defer=True))
    else:
        rest = [operand for operand in operands if operand is not kernel]
        scaled = call.op in _SCALINGS and (call.op is not _DIVISION or call.args[0] is kernel)
        kept_zeros = call.op in COPIES or scaled
        layers = meet(call, [*rest, kernel])  # where labels meet, those of the last operand stay: the kernel's own
        out = Labelled(call.shape, layers, kernel.source, derived=kernel.derived or not kept_zeros)
    return [out for _ in call.shapes] if len(call.shapes) > 1 else out


RULES[torch.Tag.pointwise] = elementwise


@rule("aten.glu")
def gated_linear_unit(call: OpCall) -> Labelled:
    """The first half of a dimension times the sigmoid of the second: position i of both halves is coupled."""
    value, dim = call.args[0], call.arg(1, "dim", -1)
    halves = [layer.chunk(2, dim) if layer.shape[dim] > 1 else (layer, layer) for layer in value.layers]
    for first, second in halves:
        call.space.merge(first, second)
    return Labelled(call.shape, tuple(first for first, _ in halves))


def _kernel_among(call: OpCall, operands: list[Labelled]) -> Labelled | None:
    """The operand that is a parameter's elements, if a call computes a kernel from parameters and numbers only."""
    full = [operand for operand in operands if operand.source is not None and operand.shape == call.shape]
    others = (operand for operand in operands if operand.source is None)
    if not full or any(prod(operand.shape) > 1 for operand in others):
        return None
    return min(full, key=lambda operand: operand.source in call.findings.buffers)


_DIVISION = torch.ops.aten.div.Tensor

_SCALINGS = {torch.ops.aten.mul.Tensor, _DIVISION, torch.ops.aten.neg.default}
"""Ops that keep zeros at zero."""

COPIES = {
    torch.ops.aten._to_copy.default,
    torch.ops.aten.clone.default,
    torch.ops.aten.detach.default,
    torch.ops.aten.alias.default,
    torch.ops.aten.lift_fresh.default,
}
"""Ops that copy their input."""


def meet(call: OpCall, operands: list[Labelled], defer: bool = False) -> tuple[Tensor, ...]:
    """Layers of the broadcast combination of `operands`, with labels that meet merged.

    A label that meets a dimension of the same size without labels (an input's, a constant's) is pinned. Where one
    operand varies along more dimensions than the other, they are merged now, or later with `defer`.
    """
    ndim = len(call.shape)
    merged: list[Tensor] = []
    for operand in operands:
        for layer in operand.layers:
            aligned = layer.reshape((1,) * (ndim - operand.ndim) + tuple(layer.shape))
            merged = join(call, merged, aligned, defer)
    for operand in operands:
        for dim, size in enumerate(operand.shape, start=ndim - operand.ndim):
            own_dim = dim - ndim + operand.ndim
            if size > 1 and operand.layer(own_dim) is None:
                for layer in [layer for layer in merged if layer.shape[dim] > 1]:
                    merged = _drop_dim(call, merged, layer, dim)
    return tuple(merged)


def join(call: OpCall, layers: list[Tensor], new: Tensor, defer: bool) -> list[Tensor]:
    """Add a layer, merged with the layers that vary along any of the same dimensions.

    With `defer`, a layer that varies along all dimensions of another one and more is left as it is, to be merged later.
    """
    apart = []
    for layer in layers:
        shared = set(varying(layer)) & set(varying(new))
        if not shared:
            apart.append(layer)
            continue
        if layer.shape == new.shape:
            call.space.merge(layer, new)
            continue
        wide, narrow = (layer, new) if len(varying(layer)) > len(varying(new)) else (new, layer)
        if defer and shared == set(varying(narrow)):
            call.findings.deferred_merges.append(DeferredMerge(wide, narrow, call.module, str(call.op)))
            new = wide
            continue
        # One varies along more dimensions than the other. Merged, they vary along the shared ones only.
        first = call.space.merge_along(layer, set(varying(layer)) - shared)
        second = call.space.merge_along(new, set(varying(new)) - shared)
        call.space.merge(first, second)
        new = first
    return [*apart, new]


def _drop_dim(call: OpCall, layers: list[Tensor], layer: Tensor, dim: int) -> list[Tensor]:
    rest = [other for other in layers if other is not layer]
    if set(varying(layer)) - {dim}:
        return [*rest, call.space.merge_along(layer, {dim})]
    call.pin(layer, "meets a tensor whose channels no layer owns")
    return rest
