"""`min` and `max` of sizes in a traced forward, such as `min(batch, 4)`: they stay expressions.

Python would compare proxies, whose answer is guarded. That is still so where a size is one of channels: the forward has
to go on as the dense model does, whose sizes decide.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

from torch import Tensor, fx

from rewriters.forwards.proxies import ValueProxy, ValueTracer
from rewriters.recording import leaves_of

_len, _min, _max = len, min, max  # they are patched while a forward is traced

_NUMBERS = (int, float, round, abs, sum, _min, _max, *vars(math).values(), *vars(operator).values())
"""Functions whose result is a number made of those that they are given."""


def followed_extreme(plain: Callable[..., Any]) -> Callable[..., Any]:
    """`min` or `max` for code that is traced."""

    def extreme(*args: Any, **kwargs: Any) -> Any:
        proxies = [leaf for leaf in leaves_of(args) if type(leaf) is ValueProxy]
        if not proxies or kwargs or any(map(_may_be_of_channels, proxies)):
            return plain(*args, **kwargs)
        return proxies[0].tracer.create_proxy("call_function", plain, args, {})

    return extreme


EXTREMES = {"min": followed_extreme(_min), "max": followed_extreme(_max)}


def _may_be_of_channels(proxy: ValueProxy) -> bool:
    return _is_of_channels(proxy.node, proxy.tracer)


def _is_of_channels(node: fx.Node, tracer: ValueTracer) -> bool:
    """Whether a number, or one of several, may be made of a size along which channels lie."""
    if isinstance(node.meta["val"], Tensor):
        return True
    if node.op in ("placeholder", "get_attr"):
        return False
    tensor, dims = _sizes_read(node)
    if tensor is not None:
        return any(tracer.has_channels(tensor, dim % tensor.ndim) for dim in dims)
    of_numbers = node.op == "call_function" and node.target in _NUMBERS
    return not of_numbers or any(_is_of_channels(source, tracer) for source in node.all_input_nodes)


def _sizes_read(node: fx.Node) -> tuple[Tensor | None, list[int]]:
    """The tensor that sizes are read from, and their dimensions; None for other numbers."""
    given: list[Any] = [
        arg.meta["val"] if isinstance(arg, fx.Node) else arg for arg in (*node.args, *node.kwargs.values())
    ]
    x = given[0] if given else None
    if isinstance(x, Tensor):
        if node.target is _len:
            return x, [0]
        if node.target == "size" and given[1:]:
            return x, given[1:]
        every = node.target == "size" or (node.target is getattr and given[1] == "shape")
        return (x, list(range(x.ndim))) if every else (None, [])
    if node.target is operator.getitem and isinstance(node.args[0], fx.Node) and isinstance(given[1], (int, slice)):
        tensor, dims = _sizes_read(node.args[0])
        picked = dims[given[1]] if tensor is not None else []
        return tensor, picked if isinstance(picked, list) else [picked]
    return None, []
