"""Recurrent layers: a hidden unit lives or dies with all rows that compute its gates."""

from __future__ import annotations

from torch import Tensor

from rewriters.labelling.channel_map import Kernel, Side
from rewriters.labelling.labels import Labelled
from rewriters.labelling.rules.registry import READS_KEPT, KernelCall, OpCall, Result, rule, unknown


@rule("aten.mkldnn_rnn_layer")
def lstm_layer(call: OpCall) -> Result:
    """One layer of an LSTM in one direction.

    x is (steps, N, I), and the kernels are (4 H, I) and (4 H, H), where the gates of one hidden unit are H rows apart.
    The layer itself reads a unit, so a gate stands there too: a dead unit reaches no other unit.
    """
    x, w_input, w_hidden = call.args[:3]
    vectors, states = call.args[3:5], call.args[5:7]
    if not all(_is_own(call, weight) for weight in (w_input, w_hidden)):
        return unknown(call)
    units = w_hidden.shape[1]
    hidden = _labels(w_hidden, 1, units)
    for value in (w_input, w_hidden, *vectors):
        layer = value.layer(0)
        if layer is not None:
            call.space.merge(layer.reshape(4, units), hidden.view(1, units))
    for state in states:
        layer = state.layer(-1)
        if layer is not None:
            call.space.merge(layer.flatten(), hidden)
        else:
            call.pin(hidden, "its initial state is an input of the model")
    data, into = x.layer(-1), _labels(w_input, 1, w_input.shape[1])
    if data is None:
        call.pin(into, READS_KEPT)
    else:
        rest = [dim for dim in range(x.ndim - 1) if data.shape[dim] > 1]
        call.space.merge(call.space.merge_along(data, rest).flatten(), into)
    for weight, gated in ((w_input, data is not None), (w_hidden, True)):
        _note(call, weight, gated, x.shape[0] * x.shape[1])
    along = hidden.view(*[1] * (len(call.shape) - 1), units)
    others = tuple(layer for layer in x.layers if layer is not data)
    layers = call.mix(Labelled((*x.shape[:-1], 1), others), range(x.ndim - 1), "mixed along its steps")
    states_out = [Labelled(shape, (hidden.view(*[1] * (len(shape) - 1), units),)) for shape in call.shapes[1:3]]
    return [Labelled(call.shape, (*layers, along)), *states_out, *[Labelled(shape) for shape in call.shapes[3:]]]


def _is_own(call: OpCall, weight: Labelled) -> bool:
    return weight.source is not None and not weight.derived and weight.source not in call.findings.buffers


def _labels(weight: Labelled, dim: int, size: int) -> Tensor:
    layer = weight.layer(dim)
    assert layer is not None and layer.numel() == size
    return layer.flatten()


def _note(call: OpCall, weight: Labelled, gated: bool, positions: int) -> None:
    kernel = Kernel(call.module, str(weight.source), positions, 1, gated, positions)
    call.findings.kernels.append(KernelCall(kernel))
    if gated:
        call.findings.gated.add(Side(kernel.weight, 1))
