"""Numbers that know where they come from: a tensor's size, a module's attribute, or what was computed from these.

A forward's own code runs with them while it is recorded. They are ints and floats to it. Whoever reads the recorded
calls can tell the 8 of `x.view(n, -1, self.heads, 8)` from the 8 that `self.heads` is.
"""

from __future__ import annotations

import contextlib
import operator
import threading
from collections.abc import Callable, Iterator
from typing import Any

Source = tuple[Any, ...]
"""("size", id of a tensor, dimension), ("attribute", path, name), or ("call", function, arguments)."""


class _Thread(threading.local):
    """What each thread tells of reads."""

    note: Callable[[Any], None] | None = None


_thread = _Thread()


@contextlib.contextmanager
def reads_noted(note: Callable[[Any], None] | None) -> Iterator[None]:
    """Inside, `note` is told of numbers whose value code asks for: to compare it, as a float."""
    before, _thread.note = _thread.note, note
    try:
        yield
    finally:
        _thread.note = before


class SourcedInt(int):
    """An int with a `source`."""

    source: Source

    __hash__ = int.__hash__


class SourcedFloat(float):
    """A float with a `source`."""

    source: Source

    __hash__ = float.__hash__


Sourced = SourcedInt | SourcedFloat


def sourced(value: float, source: Source) -> Any:
    """The value as a number that knows its source."""
    made: Sourced = SourcedInt(value) if isinstance(value, int) else SourcedFloat(value)
    made.source = source
    return made


def plain(value: Any) -> Any:
    """The number without its source; anything else as it is."""
    if isinstance(value, SourcedInt):
        return int.__int__(value)
    return float.__float__(value) if isinstance(value, SourcedFloat) else value


def _computed(function: Callable[..., Any], reflected: bool) -> Callable[..., Any]:
    def method(self: Sourced, *others: Any) -> Any:
        if any(type(other) not in (int, float, SourcedInt, SourcedFloat) for other in others):
            return NotImplemented
        operands = (*others, self) if reflected else (self, *others)
        return sourced(function(*map(plain, operands)), ("call", function, operands))

    return method


def _read(function: Callable[..., Any]) -> Callable[..., Any]:
    def method(self: Sourced, *others: Any) -> Any:
        if any(type(other) not in (int, float, bool, SourcedInt, SourcedFloat) for other in others):
            return NotImplemented
        value = function(*map(plain, (self, *others)))
        if _thread.note is not None:
            _thread.note(sourced(value, ("call", function, (self, *others))))
        return value

    return method


_COMPUTED = ("add", "sub", "mul", "floordiv", "truediv", "mod", "pow")
_READ = {
    **{f"__{name}__": getattr(operator, name) for name in ("eq", "ne", "lt", "le", "gt", "ge")},
    "__bool__": bool, "__int__": int, "__float__": float, "__round__": round, "__trunc__": int,
}  # fmt: skip


def _follow(kind: type) -> None:
    """Replace the methods of a kind of number."""
    for name in _COMPUTED:
        setattr(kind, f"__{name}__", _computed(getattr(operator, name), reflected=False))
        setattr(kind, f"__r{name}__", _computed(getattr(operator, name), reflected=True))
    methods = {"__neg__": _computed(operator.neg, reflected=False)}
    methods |= {name: _read(function) for name, function in _READ.items()}
    for name, method in methods.items():
        setattr(kind, name, method)


_follow(SourcedInt)
_follow(SourcedFloat)
