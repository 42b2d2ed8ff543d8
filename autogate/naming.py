"""Names that the caller gives: the tensors they refer to, and suggestions for a name that doesn't exist."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

from rewriters import AutogateError

Ignored = str | nn.Module | Tensor | type[nn.Module] | Iterable[str | nn.Module | Tensor | type[nn.Module]]
"""What `ignore` takes: see `named_by`."""


def named_by(model: nn.Module, ignore: Ignored) -> list[str]:
    """Names of the parameters and buffers that `ignore` refers to.

    Args:
        model: the model.
        ignore: one or several of: names of parameters, paths of modules, both with wildcards if you like
            ("blocks.*.attn"); modules and parameters themselves; types of modules.

    Raises:
        AutogateError: one of them is of another type, or refers to nothing in the model.
    """
    one = isinstance(ignore, (str, type, nn.Module, Tensor)) or not isinstance(ignore, Iterable)
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    modules = [(path, module) for path, module in model.named_modules(remove_duplicate=False) if path]
    named: dict[str, None] = {}
    for what in (ignore,) if one else ignore:
        if isinstance(what, str):
            paths, own = _by_name(model, what, [path for path, _ in modules], [name for name, _ in tensors])
        else:
            paths, own = _by_object(model, what, modules, tensors)
        named |= dict.fromkeys(own)
        named |= {name: None for path in paths for name, _ in tensors if name.startswith(f"{path}.")}
    return list(named)


def _by_name(model: nn.Module, name: str, paths: list[str], tensors: list[str]) -> tuple[list[str], list[str]]:
    """Paths and names of tensors that a name or a pattern refers to."""
    found = [path for path in paths if fnmatchcase(path, name)], [own for own in tensors if fnmatchcase(own, name)]
    if not any(found):
        raise AutogateError(
            f"ignore names {name!r}, which is neither a module nor a parameter of the model.",
            where=type(model).__name__,
            remedy=did_you_mean(name, paths + tensors),
        )
    return found


def _by_object(
    model: nn.Module, what: Any, modules: list[tuple[str, nn.Module]], tensors: list[tuple[str, Tensor]]
) -> tuple[list[str], list[str]]:
    """Paths and names of tensors that a module, a parameter or a type of modules refers to."""
    is_type = isinstance(what, type) and issubclass(what, nn.Module)
    if not is_type and not isinstance(what, (nn.Module, Tensor)):
        raise AutogateError(
            f"ignore has a {type(what).__name__}: {what!r}.",
            where=type(model).__name__,
            remedy='Give names of modules or parameters ("head", "blocks.*.attn"), modules, or types of modules.',
        )
    paths = [path for path, module in modules if module is what or (is_type and isinstance(module, what))]
    own = [name for name, tensor in tensors if tensor is what]
    if not paths and not own:
        shown = what.__name__ if is_type else f"a {type(what).__name__}"
        raise AutogateError(
            f"ignore has {shown}, of which the model has none."
            if is_type
            else f"ignore has {shown} that is not in it.",
            where=type(model).__name__,
            remedy="See model.named_modules().",
        )
    return paths, own


def did_you_mean(name: str, known: list[str]) -> str:
    """A remedy for an unknown name: the known names that look like it."""
    near = difflib.get_close_matches(name, known, n=3)
    return f"Did you mean {' or '.join(map(repr, near))}?" if near else "See model.named_modules()."
