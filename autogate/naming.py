"""Names that the caller gives: the tensors they refer to, and suggestions for a name that doesn't exist."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from torch import nn

from rewriters import AutogateError


def named_by(model: nn.Module, ignore: Iterable[str]) -> list[str]:
    """Names of the parameters and buffers that `ignore` refers to: their own names, or the paths of their modules.

    Raises:
        AutogateError: a name is neither a module nor a tensor of the model.
    """
    ignore = (ignore,) if isinstance(ignore, str) else tuple(ignore)
    tensors = [name for name, _ in (*model.named_parameters(), *model.named_buffers())]
    paths = [path for path, _ in model.named_modules() if path]
    named = []
    for name in ignore:
        found = [tensor for tensor in tensors if tensor == name or tensor.startswith(f"{name}.")]
        if not found and name not in paths:
            raise AutogateError(
                f"ignore names {name!r}, which is neither a module nor a parameter of the model.",
                where=type(model).__name__,
                remedy=did_you_mean(name, paths + tensors),
            )
        named += found
    return named


def did_you_mean(name: str, known: list[str]) -> str:
    """A remedy for an unknown name: the known names that look like it."""
    near = difflib.get_close_matches(name, known, n=3)
    return f"Did you mean {' or '.join(map(repr, near))}?" if near else "See model.named_modules()."
