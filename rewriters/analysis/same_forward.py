"""Whether a module does the same to channels in train mode as in eval mode, judged by its two recordings.

Most forwards that ask for their mode only drop something at random. A product with a mask that was drawn in the shape
of its other factor, or for each sample, leaves channels what they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from rewriters.recording import Capture, ModuleCall, args_of, is_draw, is_getitem, tensors_of

_aten = torch.ops.aten

_LIKE = frozenset((_aten.empty_like.default, _aten.rand_like.default, _aten.randn_like.default))
_SCALES = frozenset((_aten.mul.Tensor, _aten.mul_.Tensor, _aten.div.Tensor, _aten.div_.Tensor))
_MASK = "a mask"


def same_forward(captured: Capture, call: ModuleCall, trained: Capture) -> bool:
    """Whether a module makes the same ATen calls in train mode, apart from masks drawn at random.

    Args:
        captured: the model in eval mode.
        call: a call of the module in it.
        trained: the module alone in train mode, called with the same.
    """
    alike: dict[fx.Node, Any] = {}
    given = {id(tensor): captured.nodes[id(tensor)] for tensor in tensors_of((call.args, call.kwargs))}
    inputs = iter(given[id(tensor)] for tensor in tensors_of((call.args, call.kwargs)))
    own = {node.target: node for node in captured.graph.nodes if node.op == "get_attr"}
    within = {id(inner) for inner in call.walk()}
    left = iter([node for node in captured.graph.nodes if id(node.meta.get("call")) in within])
    wanted: fx.Node | None = next(left, None)
    for node in trained.graph.nodes:
        if node.op == "placeholder":
            alike[node] = next(inputs)
        elif node.op == "get_attr":
            alike[node] = own.get(f"{call.path}.{node.target}".lstrip("."))
        elif node.op == "call_function" and wanted is not None and _is_same_call(node, wanted, alike):
            alike[node], wanted = wanted, next(left, None)
        elif node.op == "call_function":
            alike[node] = _unmasked(node, alike)
            if alike[node] is None:
                return False
    returned = [alike.get(trained.nodes[id(tensor)]) for tensor in tensors_of(trained.root.output)]
    same = returned == [captured.nodes.get(id(tensor)) for tensor in tensors_of(call.output)]
    paths = [f"{call.path}.{inner.path}".strip(".") for inner in trained.calls()]
    return wanted is None and same and paths == [inner.path for inner in call.walk()]


def _is_same_call(node: fx.Node, wanted: fx.Node, alike: Mapping[fx.Node, Any]) -> bool:
    if node.target is not wanted.target:
        return False
    return bool(fx.node.map_arg((node.args, node.kwargs), alike.get) == (wanted.args, wanted.kwargs))


def _unmasked(node: fx.Node, alike: Mapping[fx.Node, Any]) -> Any:
    """What a call of train mode alone stands for: a mask, or the value that it masks; None for anything else."""
    given = [alike.get(source) for source in node.all_input_nodes]
    if node.target is _aten.native_dropout.default or (is_getitem(node) and _drops(args_of(node)[0])):
        return given[0] if not is_getitem(node) or args_of(node)[1] == 0 else _MASK
    if node.target in _LIKE or (not _has_channels(node) and (_creates(node) or is_draw(node.target, *_call(node)))):
        return _MASK
    if given and all(one is _MASK for one in given):
        return _MASK
    if node.target in _SCALES and len(given) == 2 and given[1] is _MASK and given[0] is not _MASK:
        masked = args_of(node)[0].meta["val"]
        return given[0] if masked.shape == node.meta["val"].shape else None
    return None


def _call(node: fx.Node) -> tuple[Any, Any]:
    return node.args, node.kwargs


def _drops(node: fx.Node) -> bool:
    return node.target is _aten.native_dropout.default


def _has_channels(node: fx.Node) -> bool:
    """Whether a value has more than one entry for a sample: it may have been made as long as there are channels."""
    values: Iterator[Tensor] = (value for value in [node.meta["val"]] if isinstance(value, Tensor))
    return not all(size == 1 for value in values for size in value.shape[1:])


def _creates(node: fx.Node) -> bool:
    return str(node.target).startswith(("aten.new_empty", "aten.empty", "aten.rand.", "aten.new_full", "aten.new_ones"))
