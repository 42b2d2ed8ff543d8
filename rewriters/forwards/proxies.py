"""Proxies that know the value they stand for: control flow on shapes, types and lengths can be followed."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx
from torch.fx.proxy import Attribute

from rewriters.errors import TraceError

_len = len  # builtins may have another while a forward is followed


class ValueTracer(fx.Tracer):
    """A tracer whose proxies know their values."""

    def concrete(self, proxy: ValueProxy) -> Any:
        """The value of a proxy, which control flow depends on from here on."""
        raise NotImplementedError


class ValueProxy(fx.Proxy):
    """A proxy that knows the value it stands for.

    Asked by a traced forward, `isinstance` and `len` answer for the value (`tracer_patches.py`). The former isn't
    made to by a `__class__` of the value's: PyTorch's C++ would believe that too, and read memory that a tensor would
    have.
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
        # A number of dimensions is a number: forms are looked up by it (in a dict, by einops), and slimming keeps it.
        return self.tracer.concrete(found) if isinstance(self.value, Tensor) and name == "ndim" else found

    def length(self) -> Any:
        """What `len` is: of a tensor a size, which stays an expression; the number itself of anything else."""
        of_tensor = isinstance(self.value, Tensor)
        return self.tracer.create_proxy("call_function", _len, (self,), {}) if of_tensor else _len(self.value)

    def __iter__(self):
        return iter([self[index] for index in range(self.__len__())])

    def __setitem__(self, key: Any, value: Any) -> None:
        """x[key] = y, written as what it does: y is copied into a view of x, or written to the places picked in it."""
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
    """A key as PyTorch takes it: what makes a view (numbers, slices, None, ...), then what is picked in that view.

    Either is empty where it would leave all as it is.
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
    """Whether an index takes all there is."""
    return item is Ellipsis or (isinstance(item, slice) and item.start is item.stop is item.step is None)
