"""Tensors created in the forward: their labels belong to no layer, and are removed with the channels that they meet."""

from __future__ import annotations

from rewriters.labelling.labels import Labelled
from rewriters.labelling.rules.registry import OpCall, rule


@rule(
    "aten.zeros.default", "aten.ones.default", "aten.full.default", "aten.empty.memory_format", "aten.new_zeros",
    "aten.new_ones", "aten.new_full", "aten.new_empty",
)  # fmt: skip
def create(call: OpCall) -> Labelled:
    """The same number everywhere: any index can be removed without changing the others."""
    layers = [call.space.fresh_along(call.shape, dim) for dim, size in enumerate(call.shape) if size > 1]
    return Labelled(call.shape, tuple(layers))
