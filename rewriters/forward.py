"""A module's forward in the form of a rewritten torch.fx graph.

The module stays the object it was, with its class, hooks, attributes and children; only its `forward` is
shadowed on the instance.
"""

from __future__ import annotations

import linecache
import types
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx, nn
from torch.fx.node import has_side_effect


class ShapeGuardError(RuntimeError):
    """A rewritten forward ran with arguments that decide its control flow otherwise than when traced."""


@has_side_effect
def guard(value: Any, expected: Any) -> None:
    """Raise unless `value` is what the traced control flow was decided on."""
    if value != expected:
        raise ShapeGuardError(
            f"this forward was rewritten for a case where {expected!r} held and now finds {value!r}: "
            "give prepare example inputs of the shape that the model is run with"
        )


class RewrittenForward:
    """Runs generated code in the place of a module's forward; picklable and copied with its module.

    Args:
        owner: the module.
        graphs: the rewritten graph for each value of `owner.training`.
    """

    def __init__(self, owner: nn.Module, graphs: Mapping[bool, fx.Graph]):
        codes = {training: graph.python_code("self") for training, graph in graphs.items()}
        self.owner = owner
        self.sources = {training: code.src for training, code in codes.items()}
        self.globals = {training: dict(code.globals) for training, code in codes.items()}
        self._compile()

    def _compile(self) -> None:
        self._functions = {training: self.function(training) for training in self.sources}

    def function(self, training: bool) -> Callable[..., Any]:
        """The generated function, taking the module as its first argument."""
        name = f"<autogate rewritten forward {id(self)} {training}>"
        source = self.sources[training]
        linecache.cache[name] = (len(source), None, source.splitlines(True), name)  # for tracebacks
        scope = dict(self.globals[training])
        exec(compile(source, name, "exec"), scope)
        return scope["forward"]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._functions[self.owner.training](self.owner, *args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_functions"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._compile()


def own_forward(module: nn.Module) -> Callable[..., Any]:
    """The function a module runs, taking the module as its first argument."""
    forward = module.__dict__.get("forward")
    if isinstance(forward, RewrittenForward):
        return forward.function(module.training)
    if isinstance(forward, types.MethodType) and forward.__self__ is module:
        return forward.__func__
    if forward is not None:
        raise torch.fx.proxy.TraceError("its forward was replaced on the instance")
    return type(module).forward
