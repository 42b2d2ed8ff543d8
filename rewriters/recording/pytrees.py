"""Find the tensors in nested tuples, lists and dicts, and in graphs."""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

_ONE = frozenset((bool, int, float, str, type(None)))


def leaves_of(value: Any) -> list[Any]:
    """The same as pytree's `tree_leaves`, in a fraction of its time for the usual containers."""
    kind = type(value)
    if kind in _ONE or isinstance(value, Tensor):
        return [value]
    if kind is tuple or kind is list:
        return [leaf for item in value for leaf in leaves_of(item)]
    if kind is dict:
        return [leaf for item in value.values() for leaf in leaves_of(item)]
    return tree_leaves(value)


def tensors_of(value: Any) -> list[Tensor]:
    """All tensors in a value, in order."""
    if isinstance(value, Tensor):  # the usual case
        return [value]
    return [leaf for leaf in leaves_of(value) if isinstance(leaf, Tensor)]


def tensors_at(node: fx.Node) -> list[Tensor]:
    """Tensors that go into a node, and then those that come out."""
    values = [source.meta["val"] for source in node.all_input_nodes] + [node.meta["val"]]
    return tensors_of(values)


def args_of(node: fx.Node) -> tuple[Any, ...]:
    """A node's positional arguments, as `Any`: fx declares each as a union of all that a graph may hold."""
    return node.args


def all_tensors(graph: fx.Graph) -> list[Tensor]:
    """The tensors in the values of all nodes of a graph."""
    return [tensor for node in graph.nodes for tensor in tensors_of(node.meta.get("val"))]
