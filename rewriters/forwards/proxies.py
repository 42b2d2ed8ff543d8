"""Proxies that know the value they stand for, so that control flow on shapes, types and lengths can be traced.

What was decided that way becomes a guard in the graph, and sizes stay expressions. So the rewritten forward runs at
other batch sizes and resolutions, or raises an error that says why it can't.
"""

from __future__ import annotations

import abc
import math
import operator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, fx
from torch.fx.proxy import Attribute

from rewriters.errors import TraceError
from rewriters.forwards.read_code import caller, compares_identity

_len = len  # `builtins.len` is patched while a forward is traced


class ValueTracer(fx.Tracer, abc.ABC):
    """A tracer whose proxies know their values."""

    @abc.abstractmethod
    def concrete(self, proxy: ValueProxy) -> Any:
        """The value of a proxy, which control flow depends on from here on."""

    @abc.abstractmethod
    def has_channels(self, tensor: Tensor, dim: int) -> bool:
        """Whether channels lie along a dimension of a tensor in the graph."""


_PARTITIONS = {
    "chunk", "split", "unbind", "tensor_split", torch.chunk, torch.split, torch.unbind, torch.tensor_split,
}  # fmt: skip
"""Calls that return as many parts as a dimension has room for."""


_OF_NUMPY: dict[np.ufunc, Any] = {
    np.sqrt: math.sqrt, np.log: math.log, np.log2: math.log2, np.exp: math.exp, np.add: operator.add,
    np.subtract: operator.sub, np.multiply: operator.mul, np.divide: operator.truediv,
    np.floor_divide: operator.floordiv, np.remainder: operator.mod, np.power: operator.pow, np.negative: operator.neg,
}  # fmt: skip
"""What NumPy's functions compute of sizes, and its numbers with tensors."""

_REDUCED_BY_NUMPY: dict[np.ufunc, Any] = {np.multiply: math.prod, np.add: sum}
"""What `np.prod` and `np.sum` compute of a shape."""


_IN_PLACE = frozenset(("__iadd__", "__isub__", "__imul__", "__itruediv__"))
"""Methods that a forward may call by name."""


class ValueProxy(fx.Proxy):
    """A proxy that knows the value it stands for.

    In a traced forward, `isinstance` and `len` answer for the value; they are patched for that (`following.py`). A
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
        if name.startswith("__") and name.endswith("__") and name not in _IN_PLACE:
            raise AttributeError(name)
        if isinstance(self.value, Tensor) and name == "dim":
            return lambda: self.ndim
        if callable(getattr(self.value, name)):
            return Attribute(self, name)
        found: Any = self.tracer.create_proxy("call_function", getattr, (self, name), {})
        # `ndim` is a plain number: forwards look things up by it (einops in a dict), and slimming doesn't change it.
        plain = isinstance(self.value, Tensor) and name == "ndim"
        return self.tracer.concrete(found) if plain or self._may_be_compared(found.value) else found

    @staticmethod
    def _may_be_compared(value: Any) -> bool:
        """Whether a value has one object, and the code that reads it asks `is`, which a proxy can't answer."""
        return isinstance(value, (torch.dtype, torch.layout, bool)) and compares_identity(caller())

    def length(self) -> Any:
        """The result of `len`: an expression for a tensor's size, the number itself for anything else.

        If another input may have another number of parts, the number is guarded.
        """
        if not isinstance(self.value, Tensor) and not self._may_have_more_parts():
            return _len(self.value)
        found: Any = self.tracer.create_proxy("call_function", _len, (self,), {})
        return found if isinstance(self.value, Tensor) else self.tracer.concrete(found)

    def _may_have_more_parts(self) -> bool:
        """Whether the number of entries depends on the input: a shape's, or parts not along channels."""
        if isinstance(self.value, tuple) and all(type(entry) is int for entry in self.value):
            return True
        if self.node.target not in _PARTITIONS or self.node.op not in ("call_function", "call_method"):
            return False
        name = self.node.target if isinstance(self.node.target, str) else self.node.target.__name__
        given = [arg.meta["val"] if isinstance(arg, fx.Node) else arg for arg in self.node.args]
        place = 1 if name == "unbind" else 2
        dim = self.node.kwargs.get("dim", given[place] if _len(given) > place else 0)
        x = given[0] if given else None
        return not isinstance(x, Tensor) or not isinstance(dim, int) or not self.tracer.has_channels(x, dim % x.ndim)

    def __iter__(self):
        return iter([self[index] for index in range(self.__len__())])

    def __setitem__(self, key: Any, value: Any) -> None:
        """x[key] = y, recorded as a copy of y into a view of x, or as a write to the positions picked in that view."""
        if not isinstance(self.value, Tensor):
            raise TraceError(f"it assigns to an element of an object of type {type(self.value).__name__}")
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

    def __round__(self, digits: Any = None) -> Any:
        return self.tracer.create_proxy("call_function", round, (self,) if digits is None else (self, digits), {})

    def __divmod__(self, other: Any) -> tuple[Any, Any]:
        return self // other, self % other

    def __index__(self) -> int:
        return self.tracer.concrete(self).__index__()

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *operands: Any, **options: Any) -> Any:
        """A function of NumPy, or an operation with a number of NumPy (`np.sqrt(size)`, `np.float64(2) * x`)."""
        reduces = method == "reduce" and options.pop("axis", None) in (None, 0) and isinstance(self.value, tuple)
        function = _REDUCED_BY_NUMPY.get(ufunc) if reduces else _OF_NUMPY.get(ufunc) if method == "__call__" else None
        if function is None or any(option is not None for option in options.values()):
            return NotImplemented
        return self.tracer.create_proxy("call_function", function, operands, {})

    def __contains__(self, item: Any) -> bool:
        return bool(self.tracer.create_proxy("call_function", operator.contains, (self, item), {}))

    def __mul__(self, other: Any) -> Any:
        return self._times(other, (self, other))

    def __rmul__(self, other: Any) -> Any:
        return self._times(other, (other, self))

    def _times(self, other: Any, operands: tuple[Any, Any]) -> Any:
        if type(other) in (list, tuple):
            return other * self.__index__()
        return self.tracer.create_proxy("call_function", operator.mul, operands, {})

    def __hash__(self) -> int:
        return hash(self.tracer.concrete(self)) if self._is_attribute else id(self)

    def __format__(self, spec: str) -> str:
        return format(self.tracer.concrete(self) if self._is_attribute else self.value, spec)

    def __str__(self) -> str:
        return str(self.tracer.concrete(self)) if self._is_attribute else repr(self)

    @property
    def _is_attribute(self) -> bool:
        """Whether it is a number that is a module's attribute, as which the forward may look things up."""
        return self.node.op == "get_attr" and not isinstance(self.value, Tensor)


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
