"""The call of an opaque module, of which only inputs and outputs are known."""

from __future__ import annotations

from rewriters.labelling.labels import Labelled
from rewriters.labelling.rules.registry import RULES, OpCall, Result
from rewriters.recording import opaque_call


def unrecorded(call: OpCall) -> Result:
    """Pin all channels that go in, and those of the module's parameters; what comes out has no labels."""
    for value in call.tensors():
        for layer in value.layers:
            call.space.pin(layer, call.module, "forward", call.args[0])
    return [Labelled(shape) for shape in call.shapes]


RULES[opaque_call] = unrecorded
