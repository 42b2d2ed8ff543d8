"""A module's own code as a graph of the calls that it made in a plain run: is it right for fewer channels?

Nothing is traced: the code ran as it is, with whatever it does to caches, dicts and flags. Its numbers know where they
come from (`rewriters.recording.FunctionCalls`), so sizes of tensors, attributes and what is computed from these are
nodes of the graph; all other numbers are constants.
"""

from __future__ import annotations

import types
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, fx

from rewriters.errors import TraceError
from rewriters.forwards.guards import guard
from rewriters.forwards.label_mask import LabelMask
from rewriters.forwards.resizing import CannotResizeError, Resizer
from rewriters.forwards.traced_forward import TracedForward
from rewriters.labelling import Labelled
from rewriters.recording import FunctionCall, Sourced, is_getitem, plain


def code_as_graph(
    path: str, made: Sequence[FunctionCall | Sourced], known: Mapping[int, Labelled], alive: Mapping[int, Tensor]
) -> TracedForward:
    """The calls that a module's code made, in one call of the module, as a graph without an output.

    Args:
        path: the module.
        made: its calls, and the numbers whose values it asked for.
        known: labels of the tensors in the recording, by id.
        alive: these tensors.

    Raises:
        TraceError: a number comes from a tensor that the recording doesn't have.
    """
    builder = _Builder(path, alive)
    for one in made:
        if isinstance(one, FunctionCall):
            builder.add_call(one)
        else:
            builder.add_read(one)
    return TracedForward(path, (False, True), builder.graph, known)


def is_right(code: TracedForward, mask: LabelMask, numbers: Mapping[str, int]) -> bool:
    """Whether the code computes the right thing for a mask as it is, once attributes have these numbers."""
    resizer = Resizer(code.graph, code.known, mask, code.path, numbers)
    try:
        resizer.run()
    except CannotResizeError:
        return False
    return not resizer.changed


class _Builder:
    def __init__(self, path: str, alive: Mapping[int, Tensor]) -> None:
        self._path, self._alive = path, alive
        self.graph = fx.Graph()
        self._nodes: dict[Any, fx.Node] = {}

    def add_call(self, made: FunctionCall) -> None:
        if not made.nodes and isinstance(made.output, Tensor) and any(made.output is arg for arg in made.args):
            return  # `x.to(device)` where it is there already
        args, kwargs = self._argument(made.args), self._argument(made.kwargs)
        ops = [node.target for node in made.nodes if not is_getitem(node)]
        function, owner = made.function, getattr(made.function, "__self__", None)
        if isinstance(owner, types.GetSetDescriptorType):  # a property of a tensor: `x.T`
            function, args = getattr, (args[0], owner.__name__)
        node = self._call(function, args, kwargs, made.output, ops)
        if isinstance(made.output, Tensor):
            self._nodes[id(made.output)] = node
        elif isinstance(made.output, (tuple, list)):
            for index, tensor in enumerate(made.output):
                if isinstance(tensor, Tensor):
                    self._nodes[id(tensor)] = self._call(_entry, (node, index), {}, tensor)

    def add_read(self, number: Sourced) -> None:
        """The code's way may depend on this number."""
        self._call(guard, (self._number(number), plain(number), "a value"), {}, None)

    def _call(self, function: Any, args: Any, kwargs: Any, value: Any, ops: Sequence[Any] = ()) -> fx.Node:
        node = self.graph.call_function(function, args, kwargs)
        node.meta.update(val=value, ops=list(ops), statistics=[])
        return node

    def _argument(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self._tensor(value)
        if isinstance(value, Sourced):
            return self._number(value)
        if isinstance(value, (tuple, list)):
            return (list if isinstance(value, list) else tuple)(map(self._argument, value))
        if isinstance(value, dict):
            return {key: self._argument(entry) for key, entry in value.items()}
        if isinstance(value, slice):
            return slice(*map(self._argument, (value.start, value.stop, value.step)))
        return value

    def _tensor(self, tensor: Tensor) -> fx.Node:
        """The node of a tensor; one that the code didn't compute is an input of the graph."""
        if id(tensor) not in self._nodes:
            node = self._nodes[id(tensor)] = self.graph.placeholder(f"given_{len(self._nodes)}")
            node.meta.update(val=tensor, ops=[], statistics=[])
        return self._nodes[id(tensor)]

    def _number(self, number: Sourced) -> fx.Node:
        kind, *source = number.source
        if kind == "attribute":
            path, name = source
            node = self.graph.create_node("get_attr", name if path == self._path else f"{path}.{name}")
            node.meta.update(val=plain(number), ops=[], statistics=[])
            return node
        if kind == "size":
            found, dim = source
            if found not in self._alive:
                raise TraceError("it reads the size of a tensor that is not recorded")
            return self._call(_size, (self._tensor(self._alive[found]), dim), {}, plain(number))
        function, args = source
        return self._call(function, self._argument(args), {}, plain(number))


def _size(tensor: Tensor, dim: int) -> int:
    return tensor.shape[dim]


def _entry(values: Any, index: int) -> Any:
    return values[index]
