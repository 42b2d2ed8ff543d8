"""A rewritten torch.fx graph as a module's forward.

The rewritten forward shadows the module's own on the instance, for both train and eval mode. The module stays the same
object, with its class, attributes, hooks and children; it can be deep-copied and pickled. (A GraphModule instead of it
would lose all of these but the children.) Forwards with the same code, as a network's blocks have, share it compiled.
Its lines, which tracebacks show, are dropped with the last of them.

The dry run interprets rewritten forwards node by node instead (`InterpretedForward`).
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import linecache
import operator
import types
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import has_side_effect

from rewriters.forwards.multi_head_attention import multi_head_attention


class ShapeGuardError(RuntimeError):
    """A rewritten forward ran with arguments or attributes for which its control flow differs from the traced one.

    Attributes:
        where: path of the module, once the error has left its forward.
    """

    where: str


@has_side_effect
def guard(value: Any, expected: Any, what: str = "a value") -> None:
    """Raise unless `value` is the one that the control flow was traced with; `what` says what it is, and where."""
    if (
        not torch.jit.is_tracing() and value != expected
    ):  # jit.trace turns sizes into tensors, and records one case anyway
        remedy = "give prepare example inputs of the kind and shape that the model is run with"
        raise ShapeGuardError(_differs(value, expected, what, remedy))


@has_side_effect
def guard_attribute(value: Any, expected: Any, what: str) -> None:
    """As `guard`, for what only depends on attributes of modules."""
    if value != expected:
        raise ShapeGuardError(_differs(value, expected, what, "set it before prepare, and leave it as it was then"))


GUARDS = (guard, guard_attribute)


def _differs(value: Any, expected: Any, what: str, remedy: str) -> str:
    return f"this forward was traced where {what} was {expected!r}, which now is {value!r}: {remedy}"


def in_positions(x: Tensor, places: Tensor, size: int, dim: int) -> Tensor:
    """Put channels back at the positions that they had along a dimension, with zeros at the others.

    Args:
        x: of length n along `dim`.
        places: the position of each channel, int64 of shape (n,).
        size: number of positions.
        dim: counted from the last (-1).
    """
    shape = [size if other == x.ndim + dim else length for other, length in enumerate(x.shape)]
    return x.new_zeros(shape).index_copy(dim, places, x)


@dataclass(frozen=True)
class Applied:
    """Applies an `autograd.Function`, whose `apply` torch.fx would write as a function of torch's."""

    function: type[torch.autograd.Function]

    @property
    def __name__(self) -> str:
        return self.function.__name__

    def __call__(self, *args: Any) -> Any:
        return self.function.apply(*args)


_OUT_OF_PLACE = {operator.iadd: operator.add, operator.imul: operator.mul, operator.isub: operator.sub}


def out_of_place(target: Any) -> Any:
    """The function or method with the same result as an fx node's target that writes to none of its arguments."""
    if isinstance(target, str):
        return target.rstrip("_")
    return _OUT_OF_PLACE.get(target, target)


@dataclass(frozen=True)
class _ModuleName:
    name: str


class _Code:
    """Generated code; tracebacks show its lines as long as this object lives."""

    def __init__(self, source: str):
        name = f"<autogate rewritten forward {hashlib.sha256(source.encode()).hexdigest()[:16]}>"
        linecache.cache[name] = (len(source), None, source.splitlines(True), name)
        weakref.finalize(self, linecache.cache.pop, name, None)
        self.code = compile(source, name, "exec")


_CODES: weakref.WeakValueDictionary[str, _Code] = weakref.WeakValueDictionary()
"""By source: the blocks of a network, and both modes, mostly share theirs."""


def _compiled(source: str) -> _Code:
    """The compiled code of a source, shared with living forwards that have the same source."""
    code = _CODES.get(source)
    if code is None:
        code = _CODES[source] = _Code(source)
    return code


class RewrittenForward:
    """Runs generated code as a module's forward; it can be pickled, and is copied with its module.

    Args:
        owner: the module.
        graphs: the rewritten graph for each value of `owner.training`.
        path: where the module is in its model, for errors.
    """

    def __init__(self, owner: nn.Module, graphs: Mapping[bool, fx.Graph], path: str = ""):
        codes = {graph: graph.python_code("self") for graph in graphs.values()}  # both modes may have the same
        self.owner, self.path = owner, path
        self.sources = {training: codes[graph].src for training, graph in graphs.items()}
        self.globals = {training: dict(codes[graph].globals) for training, graph in graphs.items()}
        self._compile()

    def _compile(self) -> None:
        self._codes = {training: _compiled(source) for training, source in self.sources.items()}
        self._functions = {training: self.function(training) for training in self.sources}
        signature = inspect.signature(next(iter(self._functions.values())))  # the same in both modes
        self.__signature__ = signature.replace(parameters=list(signature.parameters.values())[1:])

    def function(self, training: bool) -> Callable[..., Any]:
        """The generated function, taking the module as its first argument."""
        scope = dict(self.globals[training])
        exec(self._codes[training].code, scope)
        return scope.pop("forward")  # it keeps the scope as its globals

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return self._functions[self.owner.training](self.owner, *args, **kwargs)
        except ShapeGuardError as error:
            if not hasattr(error, "where"):  # the innermost forward is where it was raised
                error.where = self.path
                error.args = (f"{self.path or type(self.owner).__name__}: {error}",)
            raise

    @property
    def __code__(self) -> types.CodeType:
        # torch.export asks a model's forward for its file and line.
        return self._functions[self.owner.training].__code__

    def __getstate__(self) -> dict[str, Any]:
        state = {name: value for name, value in self.__dict__.items() if name not in ("_codes", "_functions")}
        # Python modules (torch, math) can't be pickled; their names are stored.
        names = {
            training: {key: _ModuleName(value.__name__) if isinstance(value, types.ModuleType) else value
                       for key, value in scope.items()}
            for training, scope in self.globals.items()
        }  # fmt: skip
        return {**state, "globals": names}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.globals = {
            training: {
                key: importlib.import_module(value.name) if isinstance(value, _ModuleName) else value
                for key, value in scope.items()
            }
            for training, scope in state["globals"].items()
        }
        self._compile()


class InterpretedForward:
    """Runs rewritten graphs node by node, for a forward that runs only once.

    Compiling a long forward takes memory: 8 MB for torchvision's RAFT, which unrolls a loop of twelve rounds; its
    captured graph takes 5 MB.

    Args:
        owner, graphs, path: as for a `RewrittenForward`.
    """

    def __init__(self, owner: nn.Module, graphs: Mapping[bool, fx.Graph], path: str = ""):
        self.owner, self.graphs = owner, graphs
        self.__signature__ = inspect.signature(types.MethodType(own_forward(owner), owner))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        bound = self.__signature__.bind(*args, **kwargs)
        bound.apply_defaults()
        graph = self.graphs[self.owner.training]
        interpreter = fx.Interpreter(self.owner, graph=graph)
        interpreter.extra_traceback = False
        return interpreter.run(initial_env=placeholder_values(graph, bound.arguments))


class LiveForward(RewrittenForward):
    """A forward that takes its statistics over the live channels, while gates train.

    Args:
        owner, graphs, path: as for a `RewrittenForward`.
        names: the owner's children that take these statistics (see `rewriters.cross_channel.live_statistics`).
    """

    def __init__(self, owner: nn.Module, graphs: Mapping[bool, fx.Graph], path: str, names: tuple[str, ...]):
        super().__init__(owner, graphs, path)
        self.names = names
        self.plain = owner.__dict__.get("forward")
        """The forward that shadowed the class's own before, or None."""


_WRITTEN_OUT: dict[type[nn.Module], Callable[..., Any]] = {nn.MultiheadAttention: multi_head_attention}
"""Replacements for torch's own forwards that torch.fx would see as one call."""


def stands_in(module: nn.Module) -> bool:
    """Whether `own_forward` returns an equivalent that is written out, not the function that the module runs."""
    return own_forward(module) is _WRITTEN_OUT.get(type(module))


def own_forward(module: nn.Module) -> Callable[..., Any]:
    """The function that a module runs, with the module as its first argument.

    If the module's statistics are taken over the live channels, it is the forward that takes them over all.
    """
    forward = module.__dict__.get("forward")
    if isinstance(forward, LiveForward):
        forward = forward.plain
    if isinstance(forward, RewrittenForward):
        return forward.function(bool(module.training))
    if isinstance(forward, types.MethodType) and forward.__self__ is module:
        return forward.__func__
    if forward is not None:
        raise torch.fx.proxy.TraceError("its forward was replaced on the instance")
    return _WRITTEN_OUT.get(type(module), type(module).forward)


def placeholder_values(graph: fx.Graph, arguments: Mapping[str, Any]) -> dict[fx.Node, Any]:
    """A graph's placeholders with their values, from a call's arguments by name.

    `fx.Interpreter` would confuse **kwargs with *args if it assigned them itself.
    """
    return {node: arguments[node.target.lstrip("*")] for node in graph.find_nodes(op="placeholder")}


def bind_arguments(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """A call's arguments by the parameter names of a module's forward, defaults included."""
    bound = inspect.signature(own_forward(module)).bind(module, *args, **kwargs)
    bound.apply_defaults()
    return dict(bound.arguments)
