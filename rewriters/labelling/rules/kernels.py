"""Convolutions and matrix products: they sum over channels with a kernel, so gates may stand on their input sides.

Grouped convolutions die by whole groups if there are at least as many groups as channels in a group (a depthwise
convolution has one channel in each), and otherwise at the same position in every group.

A kernel may be computed in the forward. A standardised kernel is (W - mean) / std, with the mean and variance of each
output's inputs. Sliced along its inputs it would be another kernel, and where W has zeros it has something else. So, as
for norms across channels, its statistics are taken over the live inputs while gates train, and its dead columns are
masked where it is used (`cross_channel/live_statistics.py`). A kernel that isn't laid out as its parameter, or that is
computed from activations too, has its channels pinned.

In attention a product of activations sums over the positions in a head, so whole heads die. Scores carry a label for
each head. Heads that share keys and values die with them; a pair that all heads share stays. It is expanded for them,
and the positions along an expanded or repeated dimension get labels that belong to no layer, as zeros created in the
forward do: they are removed with the heads that they meet.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import gcd, prod

from torch import Tensor

from rewriters.labelling.channel_map import Kernel, Side
from rewriters.labelling.labels import Labelled, varying
from rewriters.labelling.rules.elementwise import meet
from rewriters.labelling.rules.registry import READS_KEPT, KernelCall, OpCall, Result, rule, unknown

NORMED = "weight norm along these channels divides zeros by their norm"
"""Why the input channels of a kernel stay that is normed along them."""

_SUMMED = "summed in a product of activations"


def _vector(call: OpCall, value: Labelled, dim: int) -> Tensor | None:
    """Labels along one dimension, shape (size,), merged along all others; None if it has no labels."""
    layer = value.layer(dim)
    if layer is None:
        return None
    others = set(varying(layer)) - {dim % value.ndim}
    return call.space.merge_along(layer, others).flatten()


def _rest(value: Labelled, dim: int) -> tuple[Tensor, ...]:
    return tuple(layer for layer in value.layers if layer.shape[dim] == 1)


def _consume(call: OpCall, data: Tensor | None, kernel: Labelled, dim: int) -> bool:
    """Sum labels `data` against a kernel's dimension `dim`; returns whether a gate can stand there.

    A gate on the kernel's side is a gate on the data's side as long as the kernel is a parameter's own elements. A
    kernel that is derived from its parameter may be nonzero where the parameter is zero: while gates train, its dead
    columns are masked where it is used, as dead channels are left out of statistics. A kernel in a buffer isn't
    trained, so no gate can stand on it.
    """
    against = _vector(call, kernel, dim)
    source = None if kernel.source in call.findings.buffers else kernel.source
    sides = call.space.sides_holding(against, source) if against is not None and source is not None else []
    normed = not call.findings.normed.isdisjoint(sides)
    if data is not None and against is not None and source is not None and not normed:
        call.space.merge(data, against)
        call.findings.gated.update(sides)
        if kernel.derived:
            call.note_statistic(against, dim % kernel.ndim - kernel.ndim, "summed against a derived kernel")
        return True
    for labels in (data, against):
        if labels is not None:
            reason = READS_KEPT if data is None else "summed against channels that no layer owns"
            reason = reason if source else "summed against a derived kernel"
            call.pin(labels, NORMED if normed else reason)
    return False


def _owned(call: OpCall, kernel: Labelled) -> Labelled:
    """The kernel, without its `source` if it isn't laid out as the parameter that it is derived from."""
    if kernel.derived:
        for dim in (0, 1):
            layer = kernel.layer(dim)
            if layer is not None and call.space.side_of(layer) != Side(str(kernel.source), dim):
                return replace(kernel, source=None)
    return kernel


@rule("aten.convolution", "aten.convolution_overrideable")
def convolution(call: OpCall) -> Labelled:
    """Regular, grouped, depthwise and transposed convolution.

    x is (N, C, ...), the kernel (O, C / groups, ...), transposed (C, O / groups, ...).
    """
    x, kernel, bias = call.args[0], _owned(call, call.args[1]), call.args[2]
    transposed, groups = call.args[6], call.args[8]
    others, along_them = call.statistic_by_position(x, range(2, x.ndim), "convolved along its channels")
    data = Labelled(x.shape, others, x.source)
    channels = _vector(call, data, 1)
    first, second = _vector(call, kernel, 0), _vector(call, kernel, 1)
    positions = prod((x.shape if transposed else call.shape)[2:]) * prod(kernel.shape[2:]) * x.shape[0]
    if groups == 1:
        out = second if transposed else first
        gate = _consume(call, channels, kernel, 0 if transposed else 1)
        _note_conv(call, kernel, positions, mixes=gate, made=out)
    else:
        out = _grouped(call, channels, first, second, kernel, groups, positions)
    if bias is not None and out is not None:
        if bias.layers:
            call.space.merge(out, bias.layers[0].flatten())
        else:
            call.pin(out, "its bias belongs to no layer")
    along = [1, -1, *[1] * (len(call.shape) - 2)]
    layers = [layer for layer in (*data.layers, *along_them) if layer.shape[1] == 1]
    return Labelled(call.shape, (*layers, out.view(along)) if out is not None else tuple(layers))


def _note_conv(call: OpCall, kernel: Labelled, macs: float, mixes: bool, made: Tensor | None = None) -> None:
    """Note the call of a kernel; `made` are the output labels of a computed one, None if all its outputs stay."""
    if kernel.source is None:
        note = Kernel.without_weight(call.module, macs * prod(kernel.shape[:2]), prod(call.shape))
        call.findings.kernels.append(KernelCall(note, made))
    else:
        transposed, groups = call.args[6], call.args[8]
        pixels = call.shape[0] * prod(call.shape[2:])
        outputs: float = pixels
        input_dim = _input_dim(call, kernel, 0 if transposed else 1) if groups == 1 else 0 if transposed else 1
        dims: tuple[int, ...] = (1 - input_dim,)
        if transposed and groups > 1:
            by_group = groups >= kernel.shape[0] // groups
            outputs, dims = (pixels * groups / kernel.shape[0], (0, 1)) if by_group else (pixels * groups, (1,))
        note = Kernel(call.module, kernel.source, macs, input_dim, mixes, outputs, dims)
        call.findings.kernels.append(KernelCall(note, _rows([x for x in call.args[0].layers if varying(x) == (0,)])))
        if mixes:
            call.findings.gated.add(note.input_side)


def _input_dim(call: OpCall, kernel: Labelled, dim: int) -> int:
    """The dimension of the parameter that a kernel's inputs lie along: it may be used transposed."""
    against = _vector(call, kernel, dim)
    side = call.space.side_of(against) if against is not None else None
    return side.dim if side is not None and side.tensor == kernel.source and side.dim < 2 else dim


def _grouped(
    call: OpCall, channels: Tensor | None, first: Tensor | None, second: Tensor | None,
    kernel: Labelled, groups: int, positions: float,
) -> Tensor | None:  # fmt: skip
    """Couple the channels of a grouped convolution by whole groups, or by position in the group.

    Whole groups die if there are at least as many groups as channels in one, which leaves more classes. Returns the
    labels of the output.
    """
    transposed = call.args[6]
    per_group = kernel.shape[0] // groups
    width = (per_group, kernel.shape[1])[not transposed]
    fixed = kernel.source is None or (kernel.source in call.findings.buffers and groups < width)
    fixed |= kernel.derived and transposed
    summed = Side(str(kernel.source), 0 if transposed else 1)
    normed = groups < width and summed in call.findings.normed
    if channels is None or first is None or fixed or normed:
        for labels in (channels, first, second):
            if labels is not None:
                call.pin(labels, NORMED if normed else "a grouped convolution over channels that no layer owns")
        _note_conv(call, kernel, positions, mixes=False)
        return first if not transposed else None
    if groups >= width:
        by_group = call.space.merge_along(channels.view(groups, -1), [1])
        call.space.merge(by_group, first.view(groups, per_group))
        _note_conv(call, kernel, positions, mixes=False)
        return first if not transposed else by_group.expand(groups, kernel.shape[1]).reshape(-1)
    places = call.space.merge_along(first.view(groups, per_group), [0])
    if transposed:
        call.space.merge(channels.view(groups, per_group), places)
    elif second is not None:
        call.space.merge(channels.view(groups, -1), second.view(1, -1))
        if kernel.derived:
            call.note_statistic(second, 1 - kernel.ndim, "summed against a derived kernel")
    gate = transposed or second is not None
    _note_conv(call, kernel, positions, mixes=gate)
    if not transposed:
        return first
    return second.view(1, -1).expand(groups, -1).reshape(-1) if second is not None else None


@rule("aten.mm", "aten.bmm", "aten.matmul", "aten.linear")
def matmul(call: OpCall) -> Result:
    """(..., m, k) x (..., k, n)."""
    return _product(call, call.args[0], call.args[1])


@rule("aten.addmm", "aten.baddbmm")
def addmm(call: OpCall) -> Result:
    """bias + (m, k) x (k, n)."""
    out = _product(call, call.args[1], call.args[2])
    bias = call.args[0]
    from_bias = Labelled((1,) * (out.ndim - bias.ndim) + bias.shape, tuple(
        layer.reshape((1,) * (out.ndim - bias.ndim) + tuple(layer.shape)) for layer in bias.layers
    ))  # fmt: skip
    for layer in from_bias.layers:
        dim = varying(layer)[0]
        own = out.layer(dim)
        if own is None:
            call.pin(layer, "added to channels that no layer owns")
        else:
            call.space.merge(call.space.merge_along(own, set(varying(own)) - {dim}), layer)
    return out


def _product(call: OpCall, left: Labelled, right: Labelled) -> Labelled:
    if left.source is None and right.source is None:
        from_left, from_right = _contracted(call, left, right)
        _note_heads(call, *from_left, *from_right)
        return _outer(call, left, from_left, right, from_right)
    flipped = left.source is not None and right.source is None
    weight, data = (left, right) if flipped else (right, left)
    contracted = (-2, -1) if flipped else (-1, -2)  # of data, of weight
    out_dim = (-1, -2) if flipped else (-2, -1)  # rows kept from data, from weight
    against = _vector(call, weight, contracted[1])
    gate = _consume(call, _vector(call, data, contracted[0]), weight, contracted[1])
    macs = data.shape[out_dim[0]] * prod(call.shape[:-2])
    rows = _rows(_rest(data, contracted[0]))
    _note_matrix(call, weight, against, _vector(call, weight, out_dim[1]), macs, gate, rows)
    return _outer(call, left, _rest(left, -1), right, _rest(right, -2))


def _contracted(call: OpCall, left: Labelled, right: Labelled) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Layers that survive a sum along the last dimension of `left` and the last but one of `right`.

    Where nothing but channels lies there, on both sides, the sum is one over the live ones. Positions in heads are
    merged instead.
    """
    met = _meet_in_a_line(call, left.layer(-1), right.layer(-2))
    if not met:
        return call.mix(left, [-1], _SUMMED), call.mix(right, [-2], _SUMMED)
    call.note_statistic(met[0], -1, _SUMMED)
    return _rest(left, -1), _rest(right, -2)


def _meet_in_a_line(call: OpCall, *layers: Tensor | None) -> list[Tensor]:
    """Merge labels that are summed against each other, if they vary along nothing else; else returns none of them."""
    lines = [layer.flatten() for layer in layers if layer is not None and len(varying(layer)) == 1]
    if not call.findings.live or len(lines) < len(layers):
        return []
    call.space.merge(*lines)
    return lines


@rule("aten._sparse_addmm")
def sparse_matmul(call: OpCall) -> Labelled:
    """total + (m, k) x (k, n), the first matrix being sparse, as the edges of a graph are."""
    total, edges, nodes = call.args[:3]
    call.mix(edges, [0, 1], "an entry of a sparse matrix")
    columns = Labelled((1, nodes.shape[1]), call.mix(nodes, [0], _SUMMED))
    return Labelled(call.shape, meet(call, [total, columns]))


@rule("aten._cdist_forward", "aten._euclidean_dist")
def distances(call: OpCall) -> Labelled:
    """Distances of the rows of (..., m, k) from those of (..., n, k)."""
    left, right = call.args[:2]
    met = _meet_in_a_line(call, left.layer(-1), right.layer(-1))
    for labels in met:
        call.note_statistic(labels, -1, _SUMMED)
    rows, columns = (_rest(value, -1) if met else call.mix(value, [-1], _SUMMED) for value in (left, right))
    flipped = Labelled((*right.shape[:-2], 1, right.shape[-2]), tuple(layer.transpose(-1, -2) for layer in columns))
    return _outer(call, left, rows, flipped, flipped.layers)


def _rows(layers: Sequence[Tensor]) -> Tensor | None:
    """Labels of the channels that a kernel repeats for, which lie along its rows; None without one layer of them."""
    return layers[0].flatten() if len(layers) == 1 else None


def _note_heads(call: OpCall, *layers: Tensor) -> None:
    """Note the labels that vary along the batches of a product of activations alone: those of heads."""
    call.findings.heads += [layer for layer in layers if -1 < max(varying(layer), default=-1) < layer.ndim - 2]


def _outer(
    call: OpCall, left: Labelled, rows: tuple[Tensor, ...], right: Labelled, columns: tuple[Tensor, ...]
) -> Labelled:
    """Labels of (..., m, k) x (..., k, n): those of the rows, of the columns, and of the batches, which meet."""
    operands = [Labelled((*left.shape[:-1], 1), rows), Labelled((*right.shape[:-2], 1, right.shape[-1]), columns)]
    return Labelled(call.shape, meet(call, operands))


@rule("aten._scaled_dot_product_flash_attention_for_cpu", "aten._scaled_dot_product_flash_attention",
      "aten._scaled_dot_product_efficient_attention", "aten._scaled_dot_product_attention_math",
      "aten._scaled_dot_product_cudnn_attention", "aten._scaled_dot_product_fused_attention_overrideable",
      "aten.scaled_dot_product_attention")  # fmt: skip
def attention(call: OpCall) -> Result:
    """softmax(q k^T) v for q, k, v of shape (batch, heads, positions, width): whole heads die, or positions in v.

    Where nothing but channels lies along the width of q and k, as with one head, the sum is one over the live ones.
    """
    query, key, value = call.args[:3]
    if query.shape[:-2] != value.shape[:-2]:  # heads that share their keys and values
        if query.ndim < 3 or query.shape[:-3] != value.shape[:-3] or query.shape[-3] % value.shape[-3]:
            return unknown(call)
        key, value = (_for_each_head(x, query.shape[-3]) for x in (key, value))
    met = _meet_in_a_line(call, query.layer(-1), key.layer(-1))
    if met:
        call.note_statistic(met[0], -1, _SUMMED)
        query, key = (replace(x, layers=_rest(x, -1)) for x in (query, key))
    scores = [Labelled((*x.shape[:-2], 1, 1), call.mix(x, [-2, -1], _SUMMED)) for x in (query, key)]
    masks = [Labelled((*x.shape[:-2], 1, 1), call.mix(x, [-2, -1], _SUMMED)) for x in list(call.tensors())[3:]]
    weighed = Labelled((*value.shape[:-2], 1, value.shape[-1]), call.mix(value, [-2], _SUMMED))
    _note_heads(call, *(layer for score in scores for layer in score.layers))
    layers = meet(call, [*scores, *masks, weighed])
    return [Labelled(shape, layers if index == 0 else ()) for index, shape in enumerate(call.shapes)]


def _for_each_head(value: Labelled, heads: int) -> Labelled:
    """Keys or values that groups of heads share, repeated for each head; those that all heads share broadcast."""
    if value.shape[-3] == 1:
        return value
    times = heads // value.shape[-3]
    layers = (x.repeat_interleave(times, -3) if x.shape[-3] > 1 else x for x in value.layers)
    return Labelled((*value.shape[:-3], heads, *value.shape[-2:]), tuple(layers))


def _note_matrix(
    call: OpCall, weight: Labelled, against: Tensor | None, kept: Tensor | None, macs: float, gate: bool,
    rows: Tensor | None,
) -> None:  # fmt: skip
    """Note the call of a matrix kernel. It may be transposed or viewed: its labels say which side is which."""
    into, out = (_side_on(call, weight, labels) for labels in (against, kept))
    given, made = (None if side is None else side.dim for side in (into, out))
    input_dim = given if given is not None else {None: 1, 0: 1, 1: 0}.get(made, 1)
    output_dim = made if made is not None else {0: 1, 1: 0}.get(input_dim, 1)
    pairs = prod(call.space.blocks.get(Side(str(weight.source), dim), (0, 1))[1] for dim in (input_dim, output_dim))
    each = macs * prod(weight.shape[-2:]) / pairs  # a pair has several elements if other dimensions were flattened
    assert weight.source is not None  # `_product` takes an operand that has one
    note = Kernel(call.module, weight.source, each, input_dim, gate, macs, (output_dim,))
    if output_dim != 1 - input_dim:
        note = replace(note, output_dim=output_dim)
    call.findings.kernels.append(KernelCall(note, rows))
    if gate and into is not None:
        call.findings.gated.add(into)


def _side_on(call: OpCall, weight: Labelled, labels: Tensor | None) -> Side | None:
    """The side of a kernel's own parameter that these labels are; None if they are another's, or not all of one."""
    side = call.space.side_of(labels) if labels is not None else None
    return side if side is not None and side.tensor == weight.source else None


_ALIGNED = 8


@rule("aten._grouped_mm")
def grouped_matmul(call: OpCall) -> Result:
    """Experts of a mixture: rows (S, k), of which each group goes through its own one of the kernels (experts, k, n).

    All experts are one parameter, so they lose the same channels. torch's kernels take rows of a multiple of 16 bytes
    only, so the channels that are summed over die in bundles of eight (in half precision) or four.
    """
    rows, kernels = call.args[:2]
    if rows.ndim != 2 or kernels.ndim != 3 or kernels.source is None:
        return unknown(call)
    for value in (rows, kernels):
        call.mix(value, [0], "values decide which kernel multiplies which rows")
    against, made = (_vector(call, kernels, dim) for dim in (1, 2))
    if against is not None:
        bundle = gcd(len(against), _ALIGNED)
        call.space.merge_along(against.view(-1, bundle), [1])
    gate = _consume(call, _vector(call, rows, 1), kernels, 1)
    _note_matrix(call, kernels, against, made, rows.shape[0], gate, None)
    return Labelled(call.shape, () if made is None else (made.view(1, -1),))
