"""Names that the caller gives: the tensors they refer to, and suggestions for a name that doesn't exist."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

from rewriters import AutogateError

_One = str | nn.Module | Tensor | type[nn.Module]
Ignored = _One | Iterable[_One]
"""What `ignore` takes: see `named_by`."""


def named_by(model: nn.Module, ignore: Ignored) -> list[str]:
    """Names of the parameters and buffers that `ignore` refers to.

    Args:
        model: the model.
        ignore: one or several of: names (see `tensors_named`), modules and parameters themselves, types of modules.

    Raises:
        AutogateError: one of them is of another type, or refers to nothing in the model.
    """
    one = isinstance(ignore, (str, type, nn.Module, Tensor)) or not isinstance(ignore, Iterable)
    several: Iterable[Any] = (ignore,) if one else ignore  # type: ignore[assignment]
    found = (
        tensors_named(model, what, "ignore") if isinstance(what, str) else _tensors_of(model, what) for what in several
    )
    return list(dict.fromkeys(name for names in found for name in names))


def _tensors_of(model: nn.Module, what: Any) -> list[str]:
    """Names of the parameters and buffers of a module, of all modules of a type, or of a parameter itself."""
    is_type = isinstance(what, type) and issubclass(what, nn.Module)
    if not is_type and not isinstance(what, (nn.Module, Tensor)):
        raise AutogateError(
            f"ignore has {what!r}, of type {type(what).__name__}.",
            where=type(model).__name__,
            remedy='Give names of modules or parameters ("head", "blocks.*.attn"), modules, or types of modules.',
        )
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    modules = list(model.named_modules(remove_duplicate=False))
    paths = [path for path, module in modules if module is what or (is_type and isinstance(module, what))]
    own = [name for name, tensor in tensors if tensor is what]
    if not paths and not own:
        missing = (
            f"{what.__name__}, of which the model has none"
            if is_type
            else f"an object of type {type(what).__name__} that isn't in it"
        )
        raise AutogateError(f"ignore has {missing}.", where=type(model).__name__, remedy="See model.named_modules().")
    under = tuple(f"{path}." for path in paths if path)
    return own + [name for name, _ in tensors if "" in paths or (under and name.startswith(under))]


def tensors_named(model: nn.Module, name: str, argument: str) -> list[str]:
    """Names of the parameters and buffers that a name refers to.

    Args:
        model: the model.
        name: a tensor's own name, the path of a module, or a glob of these, such as "layer4.*.conv2".
        argument: the argument of `prepare` that has the name, for messages.

    Raises:
        AutogateError: it is neither a module nor a tensor of the model, or a glob that matches none.
    """
    tensors = [tensor for tensor, _ in (*model.named_parameters(), *model.named_buffers())]
    paths = [path for path, _ in model.named_modules() if path]
    meant = [known for known in (*paths, *tensors) if known == name or fnmatchcase(known, name)]
    if not meant:
        raise AutogateError(
            f"{argument} names {name!r}, which is neither a module nor a parameter of the model.",
            where=type(model).__name__,
            remedy=did_you_mean(name, paths + tensors),
        )
    exact, under = set(meant), tuple(f"{path}." for path in meant)
    return [tensor for tensor in tensors if tensor in exact or tensor.startswith(under)]


class ToldKey(str):
    """A key of a state_dict that PyTorch shows with a remark when it lists keys; it is equal to the key."""

    remark: str

    def __new__(cls, key: str, remark: str) -> ToldKey:
        told = super().__new__(cls, key)
        told.remark = remark
        return told

    def __format__(self, spec: str) -> str:
        return f"{self!s} ({self.remark})"


def tell_beside(keys: list[str], ending: str, remark: str) -> None:
    """Put a remark on the first of PyTorch's missing or unexpected keys with this ending, if there is one."""
    for index, key in enumerate(keys):
        if key.endswith(ending):
            keys[index] = ToldKey(key, remark)
            return


def tell_of_missing(missing: list[str], errors: list[str], ending: str, remark: str) -> None:
    """Put a remark on the missing key with this ending, or beside the errors that there are.

    With `strict=False` PyTorch shows errors (sizes that differ) and no keys.
    """
    if errors:
        errors.append(remark)
    else:
        tell_beside(missing, ending, remark)


def did_you_mean(name: str, known: list[str]) -> str:
    """A remedy for an unknown name: the known names that look like it."""
    near = difflib.get_close_matches(name, known, n=3)
    return f"Did you mean {' or '.join(map(repr, near))}?" if near else "See model.named_modules()."
