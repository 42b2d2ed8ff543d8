"""A rewritten torch.fx graph as a module's forward.

The rewritten forward shadows the module's own on the instance, for both train and eval mode. The module stays the same
object, with its class, attributes, hooks and children; it can be deep-copied and pickled. (A GraphModule instead of it
would lose all of these but the children.) A module that is called in several ways has several graphs, and its arguments
choose one (`cases.py`).

The dry run interprets rewritten forwards node by node instead (`InterpretedForward`).
"""

from __future__ import annotations

import inspect
import itertools
import operator
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from rewriters.errors import AutogateError
from rewriters.forwards.cases import accepts, chooser
from rewriters.forwards.generated_code import GeneratedFunction
from rewriters.forwards.guards import ShapeGuardError
from rewriters.forwards.multi_head_attention import multi_head_attention


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


STALE = "stale"
"""In the meta of a graph's output: the names of the module's methods whose own code holds what was rewritten."""


@dataclass(frozen=True)
class StaleMethod:
    """Stands for a method whose code holds sizes that slimming has changed: forward was rewritten, the method was not.

    Attributes:
        name: of the method.
        path: of the module.
    """

    name: str
    path: str

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise AutogateError(
            f"{self.name} holds a size that slimming has changed. Only the forward that calls it was rewritten.",
            where=self.path or "the model",
            remedy=f"Call the module itself. Or keep its channels (`ignore`), or make {self.name} a module of its own.",
        )


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


Graphs = Mapping[bool, Sequence[fx.Graph]]
"""A module's rewritten graphs in eval mode (False) and train mode (True): one for each case (`cases.py`), often one."""


class RewrittenForward:
    """Runs generated code as a module's forward; it can be pickled, and is copied with its module.

    Args:
        owner: the module.
        graphs: its rewritten graphs.
        path: where the module is in its model, for errors.

    Attributes:
        stale: names of the module's methods that hold what was rewritten.
    """

    def __init__(self, owner: nn.Module, graphs: Graphs, path: str = ""):
        every = dict.fromkeys(itertools.chain(*graphs.values()))  # both modes may have the same
        made = {graph: GeneratedFunction(graph) for graph in every}
        choosers = {
            graph: GeneratedFunction(chooser(graph)) for cases in graphs.values() if cases[1:] for graph in cases
        }
        self.owner, self.path = owner, path
        outputs = (next(iter(graph.find_nodes(op="output"))) for graph in every)
        self.stale: frozenset[str] = frozenset().union(*(output.meta.get(STALE, ()) for output in outputs))
        self.functions = {training: tuple(made[graph] for graph in cases) for training, cases in graphs.items()}
        self._choosers = {
            training: tuple(choosers[graph] for graph in cases) for training, cases in graphs.items() if cases[1:]
        }

    def source(self, training: bool) -> str:
        """The code for a mode, of all cases."""
        return "\n".join(case.source for case in self.functions[training])

    def function(self, training: bool, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        """The generated function for a call, taking the module as its first argument.

        Raises:
            ShapeGuardError: the call is none of the cases.
        """
        cases = self.functions[training]
        return cases[0].run if len(cases) == 1 else self._choose(training, args, kwargs or {})

    def _choose(self, training: bool, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Callable[..., Any]:
        refusals = []
        for case, choose in zip(self.functions[training], self._choosers[training], strict=True):
            try:
                choose.run(self.owner, *args, **kwargs)
            except Exception as error:  # what another case takes for granted
                refusals.append(str(error))
            else:
                return case.run
        raise ShapeGuardError(f"the call is none of those that it was traced for. {'; '.join(refusals)}")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return self.function(self.owner.training, args, kwargs)(self.owner, *args, **kwargs)
        except ShapeGuardError as error:
            if not hasattr(error, "where"):  # the innermost forward is where it was raised
                error.where = self.path
                error.args = (f"{self.path or type(self.owner).__name__}: {error}",)
            raise

    @property
    def __signature__(self) -> inspect.Signature:
        signature = inspect.signature(next(iter(self.functions.values()))[0].run)  # the same in all of them
        return signature.replace(parameters=list(signature.parameters.values())[1:])

    @property
    def __code__(self) -> types.CodeType:
        # torch.export asks a model's forward for its file and line.
        return self.functions[self.owner.training][0].run.__code__


class InterpretedForward:
    """Runs rewritten graphs node by node, for a forward that runs only once.

    Compiling a long forward takes memory: 8 MB for torchvision's RAFT, which unrolls a loop of twelve rounds; its
    captured graph takes 5 MB.

    Args:
        owner, graphs, path: as for a `RewrittenForward`.
    """

    def __init__(self, owner: nn.Module, graphs: Graphs, path: str = ""):
        self.owner, self.graphs = owner, graphs
        forward = owner.__dict__.get("forward")
        own = forward if isinstance(forward, RewrittenForward) else types.MethodType(own_forward(owner), owner)
        self.__signature__ = inspect.signature(own)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        bound = self.__signature__.bind(*args, **kwargs)
        bound.apply_defaults()
        graphs = self.graphs[self.owner.training]
        given = [bound.arguments[node.target.lstrip("*")] for node in graphs[0].find_nodes(op="placeholder")]
        graph = next((one for one in graphs if accepts(chooser(one), given)), graphs[0]) if graphs[1:] else graphs[0]
        interpreter = fx.Interpreter(self.owner, graph=graph)
        interpreter.extra_traceback = False
        return interpreter.run(initial_env=placeholder_values(graph, bound.arguments))


class LiveForward(RewrittenForward):
    """A forward that takes its statistics over the live channels, while gates train.

    Args:
        owner, graphs, path: as for a `RewrittenForward`.
        names: the owner's children that take these statistics (see `rewriters.cross_channel.live_statistics`).
    """

    def __init__(self, owner: nn.Module, graphs: Graphs, path: str, names: tuple[str, ...]):
        super().__init__(owner, graphs, path)
        self.names = names
        self.plain = owner.__dict__.get("forward")
        """The forward that shadowed the class's own before, or None."""


_WRITTEN_OUT: dict[type[nn.Module], Callable[..., Any]] = {nn.MultiheadAttention: multi_head_attention}
"""Replacements for torch's own forwards that torch.fx would see as one call."""


def stands_in(module: nn.Module) -> bool:
    """Whether `own_forward` returns an equivalent that is written out, not the function that the module runs."""
    forward = module.__dict__.get("forward")
    return type(module) in _WRITTEN_OUT and (forward.plain if isinstance(forward, LiveForward) else forward) is None


def own_forward(
    module: nn.Module, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
) -> Callable[..., Any]:
    """The function that a module runs for a call, with the module as its first argument.

    If the module's statistics are taken over the live channels, it is the forward that takes them over all.
    """
    forward = module.__dict__.get("forward")
    if isinstance(forward, LiveForward):
        forward = forward.plain
    if isinstance(forward, RewrittenForward):
        return forward.function(bool(module.training), args, kwargs)
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
    bound = inspect.signature(own_forward(module, args, kwargs)).bind(module, *args, **kwargs)
    bound.apply_defaults()
    return dict(bound.arguments)
