"""What a traced forward reads from modules besides tensors: temperatures, flags, loop counts, `child.training`.

A number that is only computed with stays an expression (`self.temperature`), so that the rewritten forward follows its
changes. Where Python needs the value (a branch, `range`), it is guarded, and so are flags, texts and tuples, the fields
of an object and entries of a dict that the code names (`self.config.scale`, `self.scales["k"]`), and variables of
Python modules and closures (`names_in_code.py`).
Not guarded: sizes that slimming updates (`in_features`), and what can't be compared (a function).
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

from torch import fx, nn

from rewriters.errors import TraceError
from rewriters.forwards.names_in_code import NUMBERS, SIZES, NamesInCode, has_parts, is_compared, parts
from rewriters.forwards.read_code import asks_types, caller, compares_identity, line_of_caller
from rewriters.recording import tensors_of

_OWN_TO_TORCH = frozenset((*vars(nn.Module()), *dir(nn.Module))) - {"training"}


class AskedMode:
    """A module's `training` while its forward is traced: it says eval mode, and notes whether it was asked."""

    def __init__(self) -> None:
        self.asked = False

    def __bool__(self) -> bool:
        self.asked = True
        return False

    def __eq__(self, other: object) -> bool:
        return bool(self) == other

    def __hash__(self) -> int:
        return hash(bool(self))


class AttributeReads:
    """The attributes that a forward reads while it is traced.

    Args:
        root: the module that is traced.
        node: makes a proxy that reads an attribute of `root` by its name ("child.training"), or a variable; of a value.
        guard: has the graph raise where such a proxy has another value than now; the text says what it is.
        followed: whether numbers stay expressions. If not, they are guarded, for code that proxies can't run.
    """

    def __init__(
        self, root: nn.Module, node: Callable[[Any, Any], Any], guard: Callable[[Any, str], None], followed: bool
    ):
        self._root, self._node, self._guard, self._follows = root, node, guard, followed
        self._paths = {module: path for path, module in root.named_modules()}
        self._read: dict[tuple[str, str], Any] = {}
        self._guarded: set[tuple[str, str]] = set()
        self._objects: dict[tuple[str, str], tuple[Any, str]] = {}
        self._written: set[tuple[str, str]] = set()
        self.code = NamesInCode()

    @property
    def followed(self) -> bool:
        """Whether the forward has read a number that stays an expression."""
        return bool(self._read)

    def read(self, module: nn.Module, name: str, value: Any) -> Any:
        """What the forward gets for an attribute of a module: its value, or a proxy for it."""
        if name in _OWN_TO_TORCH or module not in self._paths:
            return value
        key = (self._paths[module], name)
        if key in self._written:
            return value
        if not (_is_number(name, value) or is_compared(name, value)):
            if type(value) in (types.FunctionType, types.MethodType):
                self.code.add(value)
            elif key not in self._objects and has_parts(value):
                self._objects[key] = value, line_of_caller()
            return value
        if name == "training":
            return self._mode(key, value)
        if self._follows and _is_number(name, value) and not _needs_value(value):
            if key not in self._read:
                self._read[key] = self._node(".".join(key).lstrip("."), value)
            return self._read[key]
        self._guard_value(key, value)
        return value

    def _mode(self, key: tuple[str, str], value: Any) -> Any:
        """Whether a module is in train mode. Its children are guarded to be in the mode that the trace is for."""
        if key[0]:
            bool(vars(self._root)["training"])  # an `AskedMode` notes it
            self._guard_value(key, value)
        return value

    def _guard_value(self, key: tuple[str, str], value: Any) -> None:
        if key not in self._guarded:
            self._guarded.add(key)
            name = ".".join(key).lstrip(".")
            self._guard(self._node(name, value), f"self.{name} at {line_of_caller()}")

    def guard_named(self) -> None:
        """Guard the variables that the code names, and the fields of objects and entries of dicts."""
        for value, _ in self._objects.values():
            self.code.add_methods(value)
        for variable, value in self.code.variables():
            if is_compared(variable.name, value):
                self._guard(self._node(variable, value), str(variable))
            else:
                self._guard_parts(variable, value, str(variable), "")
        for key, (value, line) in self._objects.items():
            name = ".".join(key).lstrip(".")
            self._guard_parts(name, value, f"self.{name}", f" at {line}")

    def _guard_parts(self, source: Any, value: Any, name: str, where: str) -> None:
        whole = None
        for path, _ in parts(value, *self.code.names()):
            whole = read = self._node(source, value) if whole is None else whole
            for part in path:
                read = read[part] if type(read.value) is dict else getattr(read, part)
            self._guard(read, f"{'.'.join((name, *path))}{where}")

    def write(self, module: nn.Module, name: str) -> None:
        """Note that the forward sets an attribute, which it reads as it is from then on."""
        key = (self._paths.get(module, ""), name)
        if module in self._paths and name not in _OWN_TO_TORCH:
            if key in self._read or key in self._guarded:
                raise TraceError(f"it keeps {name} from one call to the next, at {line_of_caller()}")
            self._written.add(key)


def follows_input(node: fx.Node) -> bool:
    """Whether a value is computed from the forward's input, and not from numbers that are attributes alone."""
    if node.op == "get_attr":
        return bool(tensors_of(node.meta["val"]))
    return node.op == "placeholder" or any(map(follows_input, node.all_input_nodes))


def _is_number(name: str, value: Any) -> bool:
    return type(value) in NUMBERS and name not in SIZES and value == value


def _needs_value(value: Any) -> bool:
    """Whether the code that reads a value asks what a proxy can't answer: its type, or `is`."""
    code = caller()
    return asks_types(code) or (not isinstance(value, (int, float)) and compares_identity(code))
