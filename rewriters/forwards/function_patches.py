"""Patches for functions that hide their code from a tracer: autograd functions, checkpointed and scripted ones."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch.utils import checkpoint

from rewriters.forwards.following import Following, hold_proxies, thread, unfollowed
from rewriters.forwards.rewritten_forward import Applied


def scripted_functions_patched() -> contextlib.AbstractContextManager[Any]:
    """Trace into functions that torch.jit has scripted, as the Python code that they were made of."""
    plain: Any = torch.jit.ScriptFunction.__call__

    def call(function: Any, *args: Any, **kwargs: Any) -> Any:
        code = getattr(function, "_torchdynamo_inline", None)
        if code is None or thread.following is None or not hold_proxies(args, kwargs):
            return plain(function, *args, **kwargs)
        return code(*args, **kwargs)

    return mock.patch.object(torch.jit.ScriptFunction, "__call__", call)


@contextlib.contextmanager
def autograd_functions_patched() -> Iterator[None]:
    """Record an `autograd.Function` as one node, so that its backward stays.

    Checkpointed functions are traced as if they weren't checkpointed.
    """
    plain = vars(torch.autograd.Function)["apply"]  # a class's method, in C or in Python

    def apply(function: type[torch.autograd.Function], *args: Any) -> Any:
        if thread.following is None or not hold_proxies(args):
            return plain.__get__(None, function)(*args)
        return _record_applied(thread.following, function, args)

    def nothing(*args: Any, **kwargs: Any) -> Iterator[None]:
        yield

    steps: dict[str, Any] = {name: nothing for name in _CHECKPOINTS_STEPS if hasattr(checkpoint, name)}
    with (
        mock.patch.object(torch.autograd.Function, "apply", classmethod(apply)),
        mock.patch.object(type(torch.autograd.Function), "__getattribute__", _attribute_of_function),
        mock.patch.multiple(checkpoint, **steps),
    ):
        yield


def _record_applied(following: Following, function: type[torch.autograd.Function], args: tuple[Any, ...]) -> Any:
    if function is checkpoint.CheckpointFunction:
        run, _, *given = args
        return run(*given)
    return following.tracer.create_proxy("call_function", Applied(function), args, {})


def _attribute_of_function(function: type[torch.autograd.Function], name: str) -> Any:
    """An attribute of an `autograd.Function`: its `forward` as one that records.

    An `apply` that was bound before the patch (`reverse = Reverse.apply`, in an attribute, a list, a partial) is C code
    that can't be patched. It reads these two attributes of its class, then calls `forward` with a context.
    """
    value = type.__getattribute__(function, name)
    if thread.following is None or name not in ("forward", "setup_context"):
        return value
    if name == "setup_context":
        return type.__getattribute__(torch.autograd.Function, name)  # as if it weren't overridden

    def forward(context: Any, *args: Any) -> Any:
        if thread.following is not None and hold_proxies(args):
            return _record_applied(thread.following, function, args)
        with unfollowed():
            setup = function.setup_context
            if setup is torch.autograd.Function.setup_context:
                return value(context, *args)
            output = value(*args)
            setup(context, args, output)
            return output

    return forward


_CHECKPOINTS_STEPS = ("_checkpoint_without_reentrant_generator", "_checkpoint_without_reentrant_generator_impl")
"""What `torch.utils.checkpoint` runs before and after a function; the name depends on the version of torch."""
