"""What the code that a trace runs through names outside of itself: variables of Python modules and of closures.

A trace holds the values that these had (`SCALE`, `settings.FLAG`, `CONFIG.scale`), so they are guarded. The code is
that of the forward, of its module's methods, of functions that made a node, and of the functions which these name.
"""

from __future__ import annotations

import dis
import functools
import importlib
import inspect
import sys
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from rewriters.forwards.read_code import caller

_LIBRARIES = frozenset((*sys.stdlib_module_names, "torch", "numpy", "rewriters", "autogate"))
"""Packages whose code and variables don't count as the user's."""

SIZES = frozenset((
    "in_channels", "out_channels", "groups", "in_features", "out_features", "num_features", "input_size", "hidden_size",
    "num_heads", "embed_dim", "kdim", "vdim", "num_parameters", "num_groups", "num_channels", "normalized_shape",
    "head_hidden_size", "_qkv_same_embed_dim",
))  # fmt: skip
"""Fields that slimming updates on some modules, or that must not follow it elsewhere: a trace has their numbers."""

NUMBERS = (int, float, torch.dtype, torch.device)
COMPARED = (*NUMBERS, bool, str, type(None))

_TRACING = ("torch.fx._symbolic_trace", "rewriters.forwards.traced_forward")
"""Python modules whose functions run the forward that is traced."""

_MOST_ENTRIES = 64
_DEEPEST = 2

Path = tuple[str, ...]


@dataclass(frozen=True)
class ModuleVariable:
    """Reads a variable of a Python module. A pickle holds their names."""

    module: types.ModuleType
    name: str

    __name__ = "variable"

    def __str__(self) -> str:
        return f"{self.module.__name__}.{self.name}"

    def __call__(self) -> Any:
        return getattr(self.module, self.name)

    def __reduce__(self) -> Any:
        return _module_variable, (self.module.__name__, self.name)


def _module_variable(module: str, name: str) -> ModuleVariable:
    return ModuleVariable(importlib.import_module(module), name)


@dataclass(frozen=True, eq=False)
class ClosureVariable:
    """Reads a variable of a closure. A copy shares it; a pickle has the value that it had."""

    cell: types.CellType
    name: str

    __name__ = "variable"

    def __str__(self) -> str:
        return self.name

    def __call__(self) -> Any:
        return self.cell.cell_contents

    def __deepcopy__(self, memo: dict[int, Any]) -> ClosureVariable:
        return self

    def __reduce__(self) -> Any:
        return _closure_variable, (self(), self.name)


def _closure_variable(value: Any, name: str) -> ClosureVariable:
    return ClosureVariable(types.CellType(value), name)


class NamesInCode:
    """The user's functions that a trace runs through, as far as proxies and names show them, and what they name."""

    def __init__(self) -> None:
        self._ran: dict[types.CodeType, bool] = {}  # False of those that others only name
        self._variables: dict[tuple[int, str], ModuleVariable | ClosureVariable] = {}
        self._before: dict[tuple[int, str], tuple[dict[str, Any] | types.CellType, Any]] = {}  # of those that code sets

    def add(self, function: Any, ran: bool = True) -> None:
        """Add a function or method, what it wraps, and the functions that it names if it ran."""
        function = getattr(function, "__func__", function)
        if type(function) is not types.FunctionType or self._has(function.__code__, ran):
            return
        code = function.__code__
        self._add_code(code, function.__globals__, ran)
        for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
            value = _content(cell)
            if type(value) is types.FunctionType:
                self.add(value, ran)
            elif code in self._ran and is_compared(name, value):
                self._note(ClosureVariable(cell, name), cell, code, value)

    def add_callers(self) -> None:
        """Add the functions that run now, down to the forward that is traced."""
        frame: types.FrameType | None = caller()
        while frame is not None and frame.f_globals.get("__name__") not in _TRACING:
            self._add_code(frame.f_code, frame.f_globals, ran=True)
            frame = frame.f_back

    def add_methods(self, value: Any) -> None:
        """Add those methods of an object, and functions in a class or Python module, that the code names."""
        if _has_fields(value):
            for name in self.names()[0]:
                self.add(inspect.getattr_static(value, name, None), ran=False)

    def _has(self, code: types.CodeType, ran: bool) -> bool:
        return code in self._ran and self._ran[code] >= ran

    def _add_code(self, code: types.CodeType, scope: dict[str, Any], ran: bool) -> None:
        if self._has(code, ran) or not _is_users(scope):
            return
        self._ran[code] = ran
        module = sys.modules[scope["__name__"]]
        for name in (name for name in _read_in(code)[0] if name in scope):
            self._note(ModuleVariable(module, name), scope, code, scope[name])
            if ran:
                self.add(scope[name], ran=False)
                self.add_methods(scope[name])

    def _note(self, variable: ModuleVariable | ClosureVariable, place: Any, code: types.CodeType, value: Any) -> None:
        key = (id(place), variable.name)
        if is_compared(variable.name, value) or has_parts(value):
            self._variables.setdefault(key, variable)
        if variable.name in _written_in(code):
            self._before.setdefault(key, (place, value))

    def names(self) -> tuple[list[str], list[str]]:
        """All names in the code, of variables and attributes, and its texts, which may be keys."""
        names, texts = zip(((), ()), *map(_read_in, self._ran), strict=True)
        return list(dict.fromkeys(chain(*names))), list(dict.fromkeys(chain(*texts)))

    def restore(self) -> str | None:
        """Give the variables that the code has set the values from before; returns one that has got another value."""
        changed = None
        for (_, name), (place, value) in self._before.items():
            now = place.get(name) if isinstance(place, dict) else _content(place)
            if now is not value and not (type(now) is type(value) and is_compared(name, value) and now == value):
                changed = name
            if isinstance(place, dict):
                place[name] = value
            elif value is not ...:
                place.cell_contents = value
        return changed

    def variables(self) -> list[tuple[ModuleVariable | ClosureVariable, Any]]:
        """The variables, with their values."""
        return [(variable, variable()) for variable in self._variables.values()]


def parts(value: Any, names: Sequence[str], texts: Sequence[Any], depth: int = 0) -> Iterator[tuple[Path, Any]]:
    """Those fields of an object, or entries of a dict, that are named and can be compared, with their values."""
    if type(value) is dict:
        named = {text: value[text] for text in texts if text in value}
    elif _has_fields(value):
        named = {name: inspect.getattr_static(value, name, ...) for name in names}
    else:
        return
    for name, part in named.items():
        if is_compared(name, part):
            yield (name,), part
        elif depth < _DEEPEST:
            yield from (((name, *path), found) for path, found in parts(part, names, texts, depth + 1))


def has_parts(value: Any) -> bool:
    return type(value) is dict or _has_fields(value)


def is_compared(name: str, value: Any) -> bool:
    """Whether a value can be guarded: a number, a flag, a text, or a few of them. Not a size that slimming updates."""
    if name in SIZES:
        return False
    if type(value) in (tuple, list):
        return 0 < len(value) <= _MOST_ENTRIES and all(type(entry) in COMPARED for entry in value)
    return type(value) in COMPARED and value == value


def _has_fields(value: Any) -> bool:
    """Whether it is the user's and has fields: an object (a configuration), a class, or a Python module."""
    if isinstance(value, types.ModuleType):
        return _package(value.__name__) not in _LIBRARIES
    if isinstance(value, type):
        return _package(value.__module__) not in _LIBRARIES
    closed = isinstance(value, (nn.Module, Tensor)) or callable(value) or hasattr(type(value), "__get__")
    return not closed and hasattr(value, "__dict__") and _package(type(value).__module__) not in ("torch", "logging")


def _package(module: str) -> str:
    return module.partition(".")[0]


def _is_users(scope: Mapping[str, Any]) -> bool:
    """Whether these are the variables of a Python module of the user's, by whose name they can be found."""
    name = scope.get("__name__", "torch")
    return _package(name) not in _LIBRARIES and vars(sys.modules.get(name, sys)) is scope


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # the variable isn't set yet
        return ...


@functools.lru_cache(maxsize=4096)
def _read_in(code: types.CodeType) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The names of variables and attributes in code, and its texts; those of functions inside of it too."""
    names, texts = dict.fromkeys(code.co_names), {one: None for one in code.co_consts if isinstance(one, str)}
    for inner in (one for one in code.co_consts if isinstance(one, types.CodeType)):
        more_names, more_texts = _read_in(inner)
        names, texts = names | dict.fromkeys(more_names), texts | dict.fromkeys(more_texts)
    return tuple(name for name in names if not name.startswith("__")), tuple(texts)


_WRITES = ("STORE_GLOBAL", "DELETE_GLOBAL", "STORE_DEREF")


@functools.lru_cache(maxsize=4096)
def _written_in(code: types.CodeType) -> frozenset[str]:
    """The variables outside of code that it sets."""
    inner = (_written_in(one) for one in code.co_consts if isinstance(one, types.CodeType))
    own = {one.argval for one in dis.get_instructions(code) if one.opname in _WRITES}
    return frozenset(own - set(code.co_cellvars)).union(*inner)
