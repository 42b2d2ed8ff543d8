"""What a traced forward reads from modules besides tensors: temperatures, flags, loop counts, `child.training`.

A number that is only computed with stays an expression (`self.temperature`), so that the rewritten forward follows its
changes. Where Python needs the value (a branch, `range`), it is guarded, and so are flags, texts and tuples, and the
fields of an object and entries of a dict that the code which reads it names (`self.config.scale`, `self.scales["k"]`).
Not guarded: sizes that slimming updates (`in_features`), and what can't be compared (a function).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from rewriters.errors import TraceError
from rewriters.forwards.read_code import asks_types, caller, compares_identity, line_of_caller
from rewriters.recording import tensors_of

_OWN_TO_TORCH = frozenset((*vars(nn.Module()), *dir(nn.Module))) - {"training"}

_SIZES = frozenset((
    "in_channels", "out_channels", "groups", "in_features", "out_features", "num_features", "input_size", "hidden_size",
    "num_heads", "embed_dim", "kdim", "vdim", "num_parameters", "num_groups", "num_channels", "normalized_shape",
    "head_hidden_size", "_qkv_same_embed_dim",
))  # fmt: skip
"""Fields that slimming updates on some modules, or that must not follow it elsewhere: a trace has their numbers."""

_NUMBERS = (int, float, torch.dtype, torch.device)
_FLAGS = (bool, str, type(None))
_MOST_ENTRIES = 64


class AttributeReads:
    """The attributes that a forward reads while it is traced.

    Args:
        root: the module that is traced.
        node: makes a proxy that reads an attribute of `root`, from its name ("child.training") and value.
        guard: has the graph raise where such a proxy has another value than now; the text says what it is.
        followed: whether numbers stay expressions. If not, they are guarded, for code that proxies can't run.
    """

    def __init__(
        self, root: nn.Module, node: Callable[[str, Any], Any], guard: Callable[[Any, str], None], followed: bool
    ):
        self._root, self._node, self._guard, self._follows = root, node, guard, followed
        self._paths = {module: path for path, module in root.named_modules()}
        self._read: dict[tuple[str, str], Any] = {}
        self._guarded: set[tuple[str, ...]] = set()
        self._written: set[tuple[str, str]] = set()

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
        if not (_is_number(name, value) or _is_compared(name, value)):
            self._guard_parts(key, value)
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

    def _guard_parts(self, key: tuple[str, str], value: Any) -> None:
        """Guard those fields of an object, or entries of a dict, that the code which reads it names."""
        code = caller().f_code
        if type(value) is dict:
            named = {one: value[one] for one in code.co_consts if isinstance(one, str) and one in value}
        elif _is_plain_object(value):
            named = {one: inspect.getattr_static(value, one, ...) for one in code.co_names}
        else:
            return
        whole = None
        for name, part in named.items():
            if (*key, name) not in self._guarded and _is_compared(name, part):
                self._guarded.add((*key, name))
                whole = self._node(".".join(key).lstrip("."), value) if whole is None else whole
                read = whole[name] if type(value) is dict else getattr(whole, name)
                self._guard(read, f"self.{'.'.join((*key, name)).lstrip('.')} at {line_of_caller()}")

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
    return not node.all_input_nodes or any(map(follows_input, node.all_input_nodes))


def _is_number(name: str, value: Any) -> bool:
    return type(value) in _NUMBERS and name not in _SIZES and value == value


def _is_compared(name: str, value: Any) -> bool:
    if name in _SIZES:
        return False
    if type(value) in (tuple, list):
        return 0 < len(value) <= _MOST_ENTRIES and all(type(entry) in (*_NUMBERS, *_FLAGS) for entry in value)
    return type(value) in (*_NUMBERS, *_FLAGS) and value == value


def _is_plain_object(value: Any) -> bool:
    """Whether it is an object of the user's with fields: a configuration, say."""
    closed = isinstance(value, (nn.Module, Tensor, type)) or callable(value)
    return not closed and hasattr(value, "__dict__") and not type(value).__module__.startswith("torch.")


def _needs_value(value: Any) -> bool:
    """Whether the code that reads a value asks what a proxy can't answer: its type, or `is`."""
    code = caller()
    return asks_types(code) or (not isinstance(value, (int, float)) and compares_identity(code))
