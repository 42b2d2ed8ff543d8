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
    given = tensors_of((call.args, call.kwargs))
    inputs = iter([captured.nodes[id(tensor)] for tensor in given])
    own = {node.target: node for node in captured.graph.nodes if node.op == "get_attr"}
    recorded = _InOrder(captured, call)
    for node in trained.graph.nodes:
        if node.op == "placeholder":
            alike[node] = next(inputs)
        elif node.op == "get_attr":
            alike[node] = own.get(f"{call.path}.{node.target}".lstrip("."))
        elif node in trained.answered:
            if not _skips(node, recorded, trained.answered[node], alike):
                return False
        elif is_getitem(node) and args_of(node)[0] in trained.answered:
            source, index = args_of(node)
            alike[node] = recorded.made(tensors_of(trained.answered[source].output)[index])
        elif node.op == "call_function" and recorded.wanted is not None and _is_same_call(node, recorded.wanted, alike):
            alike[node] = recorded.wanted
            recorded.go_on()
        elif node.op == "call_function":
            alike[node] = _unmasked(node, alike)
            if alike[node] is None:
                return False
    returned = [alike.get(trained.nodes[id(tensor)]) for tensor in tensors_of(trained.root.output)]
    same = returned == [captured.nodes.get(id(tensor)) for tensor in tensors_of(call.output)]
    return recorded.wanted is None and same and _same_calls(trained, call)


def _same_calls(trained: Capture, call: ModuleCall) -> bool:
    """Whether the same modules are called in the same order; in an answered call are those of the earlier recording."""
    now, before = list(trained.calls()), list(call.walk())
    return len(now) == len(before) and all(
        one is other or f"{call.path}.{one.path}".strip(".") == other.path
        for one, other in zip(now, before, strict=True)
    )


class _InOrder:
    """The nodes of a call in a recording, one after another, and which node made each tensor so far.

    Attributes:
        wanted: the next of them; None at the end.
    """

    def __init__(self, captured: Capture, call: ModuleCall):
        self._made: dict[int, fx.Node] = {}
        self._nodes = self._within(captured, {id(inner) for inner in call.walk()})
        self.wanted: fx.Node | None = next(self._nodes, None)

    def _within(self, captured: Capture, calls: set[int]) -> Iterator[fx.Node]:
        for node in captured.graph.nodes:
            if id(node.meta.get("call")) in calls:
                yield node
            self._made[id(node.meta.get("val"))] = node

    def go_on(self) -> None:
        self.wanted = next(self._nodes, None)

    def skip(self, call: ModuleCall) -> None:
        """Go past all nodes of a call inside."""
        calls = {id(inner) for inner in call.walk()}
        while self.wanted is not None and id(self.wanted.meta.get("call")) in calls:
            self.go_on()

    def made(self, tensor: Tensor) -> fx.Node | None:
        return self._made.get(id(tensor))


def _skips(node: fx.Node, recorded: _InOrder, earlier: ModuleCall, alike: Mapping[fx.Node, Any]) -> bool:
    """Go past a call that was answered. Whether it was given the same as in the earlier recording."""
    given = {id(tensor): tensor for tensor in tensors_of((earlier.args, earlier.kwargs))}
    same = [alike.get(source) for source in args_of(node)[1]] == [recorded.made(one) for one in given.values()]
    recorded.skip(earlier)
    return same


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
