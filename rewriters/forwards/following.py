"""Which tracer runs, and what `isinstance`, `len`, `min` and `max` answer meanwhile."""

from __future__ import annotations

import builtins
import contextlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from rewriters.forwards.attribute_reads import AttributeReads
from rewriters.forwards.extremes import EXTREMES
from rewriters.forwards.proxies import ValueProxy
from rewriters.recording import leaves_of


@dataclass(frozen=True)
class Following:
    """The tracer that runs, the attributes that were read, and the proxies of the parameters that were read."""

    tracer: fx.Tracer
    attributes: AttributeReads
    parameters: dict[str, fx.Proxy] = field(default_factory=dict)


class _Thread(threading.local):
    """The tracer of each thread; calls in other threads aren't recorded."""

    following: Following | None = None


thread = _Thread()

_PROXIES = frozenset((fx.Proxy, ValueProxy))

_PLAIN: dict[str, Callable[..., Any]] = {"isinstance": isinstance, "len": len, "min": min, "max": max}


def isinstance_of_value(instance: Any, kinds: Any) -> bool:
    """A proxy is an instance of its value's classes, and of fx's proxy classes."""
    of_plain = _PLAIN["isinstance"]
    if type(instance) is not ValueProxy:
        return of_plain(instance, kinds)
    return not _PROXIES.isdisjoint(kinds if type(kinds) is tuple else (kinds,)) or of_plain(instance.value, kinds)


def _len(of: Any) -> Any:
    """`len`, which may return a proxy: Python lets no `__len__` do that."""
    return of.length() if type(of) is ValueProxy else _PLAIN["len"](of)


_OF_VALUES = {"isinstance": isinstance_of_value, "len": _len, **EXTREMES}

ANSWERS = {id(_PLAIN[name]): answer for name, answer in _OF_VALUES.items()}
"""What stands in for these functions of Python, by their ids, where code holds the functions themselves."""


@contextlib.contextmanager
def set_following(to: Following | None) -> Iterator[None]:
    before = thread.following
    _follow_by(to)
    try:
        yield
    finally:
        _follow_by(before)


def _follow_by(to: Following | None) -> None:
    thread.following = to
    vars(builtins).update(_PLAIN if to is None else _OF_VALUES)  # for all code that the forward calls


def unfollowed() -> contextlib.AbstractContextManager[None]:
    """Inside, nothing is recorded."""
    return set_following(None)


def hold_proxies(*arguments: Any) -> bool:
    return any(type(leaf) is ValueProxy for leaf in leaves_of(arguments))
