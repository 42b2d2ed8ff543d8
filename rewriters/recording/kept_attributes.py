"""Attributes in which forwards keep tensors for later calls: a table that is made once, or again for longer inputs.

A forward that finds such a table takes another way than one that has to make it. Every analysis of a model has to find
the same, so it begins without these tables.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from rewriters.errors import CaptureError
from rewriters.recording.capture import Kept, capture
from rewriters.recording.module_walk import named_modules
from rewriters.undo_log import UndoLog


def forget(model: nn.Module, kept: Iterable[Kept], undo_log: UndoLog) -> dict[Kept, Any]:
    """Let attributes of a model be as before the first call of the forward that sets them; returns what they were."""
    values = {}
    for one in kept:
        held = model.get_submodule(one.path).__dict__
        if one.name not in held:
            continue
        values[one] = held[one.name]
        if one.absent:
            undo_log.remove(held, one.name)
        else:
            undo_log.set(held, one.name, one.value)
    return values


def remember(model: nn.Module, values: Mapping[Kept, Any], undo_log: UndoLog) -> None:
    """Let attributes be what `forget` returned."""
    for one, value in values.items():
        undo_log.set(model.get_submodule(one.path).__dict__, one.name, value)


def kept_before(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Kept, ...]:
    """The attributes that earlier calls have left on a model: those that its forward sets again if it finds none.

    Costs a recording for each name of a plain attribute that is a tensor. Most models have none.
    """
    found: list[Kept] = []
    holders: dict[str, list[str]] = {}
    for path, module in named_modules(model):
        for name in _tensors_on(module):
            holders.setdefault(name, []).append(path)
    for name, paths in holders.items():
        for absent in (False, True):
            tried = {Kept(path, name, absent) for path in paths}
            again = tried & set(_kept_without(model, tried, args, kwargs))
            found += sorted(again)
            if again:
                break
    return tuple(found)


def _tensors_on(module: nn.Module) -> Iterator[str]:
    return (name for name, value in module.__dict__.items() if type(value) is Tensor)


def _kept_without(
    model: nn.Module, tried: Iterable[Kept], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[Kept, ...]:
    undo_log = UndoLog()
    try:
        forget(model, tried, undo_log)
        return capture(model, args, kwargs).kept
    except CaptureError:  # the forward needs it
        return ()
    finally:
        undo_log.undo()
