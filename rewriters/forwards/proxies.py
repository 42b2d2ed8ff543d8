"""Proxies that know the value they stand for, so that control flow on shapes, types and lengths can be traced.

What was decided that way becomes a guard in the graph, and sizes stay expressions. So the rewritten forward runs at
other batch sizes and resolutions, or raises an error that says why it can't.
"""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx
from torch.fx.proxy import Attribute

from rewriters.errors import TraceError

_len = len  # `builtins.len` is patched while a forward is traced


class ValueTracer(fx.Tracer):
    """A tracer whose proxies know their values."""

    def concrete(self, proxy: ValueProxy) -> Any:
        """The value of a proxy, which control flow depends on from here on."""
        raise NotImplementedError


class ValueProxy(fx.Proxy):
    """A proxy that knows the value it stands for.

    In a traced forward, `isinstance` and `len` answer for the value; they are patched for that (`tracer_patches.py`). A
    `__class__` that returns the value's class won't do for `isinstance`: PyTorch's C++ would believe it too, treat the
    proxy as a tensor, and crash. And Python lets no `__len__` return an expression.
    """

    tracer: ValueTracer

    if TYPE_CHECKING:  # fx sets it

        def __getitem__(self, key: Any) -> Any: ...

    @property
    def value(self) -> Any:
        return self.node.meta["val"]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name.endswith("__"):
            raise AttributeError(name)
        if isinstance(self.value, Tensor) and name == "dim":
            return lambda: self.ndim
        if callable(getattr(self.value, name)):
            return Attribute(self, name)
        found: Any = self.tracer.create_proxy("call_function", getattr, (self, name), {})
        # `ndim` is a plain number: forwards look things up by it (einops in a dict), and slimming doesn't change it.
        return self.tracer.concrete(found) if isinstance(self.value, Tensor) and name == "ndim" else found

    def length(self) -> Any:
        """The result of `len`: an expression for a tensor's size, the number itself for anything else."""
        of_tensor = isinstance(self.value, Tensor)
        return self.tracer.create_proxy("call_function", _len, (self,), {}) if of_tensor else _len(self.value)

    def __iter__(self):
        return iter([self[index] for index in range(self.__len__())])

    def __setitem__(self, key: Any, value: Any) -> None:
        """x[key] = y, recorded as a copy of y into a view of x, or as a write to the positions picked in that view."""
        if not isinstance(self.value, Tensor):
            raise TraceError(f"it assigns to an element of a {type(self.value).__name__}")
        sliced, picked = _parts(key)
        view = self[sliced] if sliced else self
        if picked:
            self.tracer.create_proxy("call_function", operator.setitem, (view, picked, value), {})
        else:
            view.copy_(value) if isinstance(value, Tensor) else view.fill_(value)

    def __len__(self) -> int:
        return self.length().__index__()

    def __bool__(self) -> bool:
        return bool(self.tracer.concrete(self))

    def __int__(self) -> int:
        return int(self.tracer.concrete(self))

    def __float__(self) -> float:
        return float(self.tracer.concrete(self))

    def __index__(self) -> int:
        return self.tracer.concrete(self).__index__()

    def __contains__(self, item: Any) -> bool:
        return bool(self.tracer.create_proxy("call_function", operator.contains, (self, item), {}))

    def __format__(self, spec: str) -> str:
        return format(self.value, spec)


def _parts(key: Any) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Split a key as PyTorch does: what makes a view (numbers, slices, None, ...), then what is picked in that view.

    Either part is empty if it would change nothing.
    """
    sliced: list[Any] = []
    picked: list[Any] = []
    for item in key if isinstance(key, tuple) else (key,):
        if item is None or item is Ellipsis or isinstance(item, (int, slice)):
            sliced.append(item)
            picked += [] if isinstance(item, int) else [item if item is Ellipsis else slice(None)]
        else:
            given = item.value if type(item) is ValueProxy else item
            sliced += [slice(None)] * (given.ndim if getattr(given, "dtype", None) is torch.bool else 1)
            picked.append(item)
    if all(map(_is_whole, picked)):
        return tuple(sliced), ()
    return () if all(map(_is_whole, sliced)) else tuple(sliced), tuple(picked)


def _is_whole(item: Any) -> bool:
    """Whether an index takes everything."""
    return item is Ellipsis or (isinstance(item, slice) and item.start is item.stop is item.step is None)
