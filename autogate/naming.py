"""Names that the caller gives: the tensors they refer to, and suggestions for a name that doesn't exist."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from fnmatch import fnmatchcase

from torch import nn

from rewriters import AutogateError


def named_by(model: nn.Module, ignore: Iterable[str]) -> list[str]:
    """Names of the parameters and buffers that `ignore` refers to, see `tensors_named`.

    Raises:
        AutogateError: a name is neither a module nor a tensor of the model.
    """
    ignore = (ignore,) if isinstance(ignore, str) else tuple(ignore)
    return [tensor for name in ignore for tensor in tensors_named(model, name, "ignore")]


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


def did_you_mean(name: str, known: list[str]) -> str:
    """A remedy for an unknown name: the known names that look like it."""
    near = difflib.get_close_matches(name, known, n=3)
    return f"Did you mean {' or '.join(map(repr, near))}?" if near else "See model.named_modules()."
