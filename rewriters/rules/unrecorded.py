"""The call of an opaque module, of which nothing is known but what it is given and what it gives."""

from __future__ import annotations

from rewriters.labels import Labelled
from rewriters.opaque import opaque_call
from rewriters.rules.registry import RULES, OpCall, Result


def unrecorded(call: OpCall) -> Result:
    """All channels that go in stay, and so do those of the module's parameters; what comes out has none."""
    for value in call.tensors():
        for layer in value.layers:
            call.space.pin(layer, call.module, "forward", call.args[0])
    return [Labelled(shape) for shape in call.shapes]


RULES[opaque_call] = unrecorded
