"""Numbers that tensors are computed with, made of channels and of other sizes: `x / (c * h * w)`.

Slimming must not change them. The part that channels make becomes a constant; the other sizes stay expressions.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from typing import Any

from torch import fx

from rewriters.recording import tensors_of

_PRODUCTS = {
    operator.mul, operator.truediv, operator.imul, operator.itruediv, operator.neg, float, math.sqrt, math.prod,
}  # fmt: skip


def is_product_with_others(number: fx.Node, slim: Mapping[fx.Node, Any]) -> bool:
    """Whether a number is a product of sizes, or a root or power of one, and not all of these are channels."""
    others = False
    open_ends = [number]
    while open_ends:
        node = open_ends.pop()
        if node.target in _PRODUCTS or (node.target is operator.pow and not isinstance(node.args[1], fx.Node)):
            open_ends.extend(node.all_input_nodes)
        elif node.target == "numel":
            others = True
        elif _is_size(node):
            others |= _any_stays(slim[node], node.meta["val"])
        elif node.op == "get_attr":
            pass  # a number that is an attribute stays what it is
        else:
            return False
    return others


def depends_on_others(number: fx.Node, slim: Mapping[fx.Node, Any]) -> bool:
    """Whether a number is made of anything but channels and constants: of other sizes, arguments, or attributes."""
    seen, open_ends = set[fx.Node](), [number]
    while open_ends:
        node = open_ends.pop()
        if node in seen:
            continue
        seen.add(node)
        if _is_size(node):
            if _any_stays(slim[node], node.meta["val"]):
                return True
        elif node.op in ("placeholder", "get_attr") or tensors_of(node.meta["val"]):
            return True
        else:
            open_ends.extend(node.all_input_nodes)
    return False


def _is_size(node: fx.Node) -> bool:
    """Whether a number, or several in a tuple, are read from a tensor's shape."""
    if node.target == "size" or node.target is len:
        return bool(tensors_of(node.args[0].meta["val"]))  # type: ignore[union-attr]  # its tensor
    if node.target is operator.getitem and isinstance(node.args[0], fx.Node):
        return _is_size(node.args[0])
    return node.target is getattr and "shape" in node.args


def _any_stays(slim: Any, dense: Any) -> bool:
    """Whether a size is what it was before slimming; of several, whether any is."""
    return any(map(operator.eq, slim, dense)) if isinstance(dense, tuple) else bool(slim == dense)
