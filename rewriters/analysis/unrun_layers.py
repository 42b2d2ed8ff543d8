"""Layers that no example input runs (another scale, another head): what they may read stays.

They are in no recording, so nothing tells what they read. It is a value in the forward of the module that they belong
to, as wide as their inputs. A layer that this module's code never names is never run, and asks for nothing.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator

from torch import Tensor, nn

from rewriters.analysis.result import Analysis
from rewriters.labelling import varying
from rewriters.recording import ModuleCall, tensors_at, tensors_of

_REASON = "the example inputs don't run it, so what it may read stays"


def pin_for_unrun_layers(model: nn.Module, analysis: Analysis) -> None:
    """Pin the channels that layers which weren't run may read."""
    calls: dict[str, list[ModuleCall]] = {}
    for captured in analysis.captures:
        for call in captured.calls():
            calls.setdefault(call.path, []).append(call)
    unrun = list(_unrun(model, analysis, calls))
    if not unrun:
        return
    known = analysis.labelling.by_tensor()
    for path in unrun:
        owner = next(above for above in _above(path) if above in calls)
        name = path[len(owner) + bool(owner) :].partition(".")[0]
        if not _names(model.get_submodule(owner), name):
            continue
        widths = _read_widths(model.get_submodule(path))
        values = {id(value): value for call in calls[owner] for value in _values(call)}
        for value in (value for key, value in values.items() if key in known):
            for layer in known[id(value)].layers:
                if any(value.shape[dim] in widths for dim in varying(layer)):
                    analysis.labelling.space.pin(layer, path, "not run", _REASON)


def _unrun(model: nn.Module, analysis: Analysis, calls: dict[str, list[ModuleCall]]) -> Iterator[str]:
    """Paths of the outermost modules with parameters that weren't run, nor anything in them."""
    used = {
        node.target
        for captured in analysis.captures
        for node in captured.graph.nodes
        if node.op == "get_attr" and node.users
    }
    found: list[str] = []
    for path, module in model.named_modules():
        if path in calls or any(above in found for above in _above(path)):
            continue
        own = [f"{path}.{name}".lstrip(".") for name, _ in module.named_parameters()]
        inside = (f"{path}.{name}".strip(".") for name, _ in module.named_modules())
        if own and used.isdisjoint(own) and not any(name in calls for name in inside):
            found.append(path)
            yield path


def _above(path: str) -> Iterator[str]:
    while path:
        path = path.rpartition(".")[0]
        yield path


def _names(module: nn.Module, name: str) -> bool:
    """Whether code that may run in a module's forward has an attribute of this name, or asks for attributes by text."""
    own = type(module).__mro__[: type(module).__mro__.index(nn.Module)]
    spaces = [vars(module), *map(vars, own), *(vars(sys.modules[one.__module__]) for one in own)]
    functions = (value for space in spaces for key, value in space.items() if key != "__init__")
    return any({name, "getattr"} & set(_words(code)) for function in functions for code in _codes(function))


def _codes(value: object) -> Iterator[types.CodeType]:
    function = getattr(value, "__func__", getattr(value, "fget", value))
    while isinstance(function, types.FunctionType):
        yield function.__code__
        function = getattr(function, "__wrapped__", None)


def _words(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _words(constant)


def _read_widths(module: nn.Module) -> set[int]:
    """How many channels a module may read: what its layers take and don't make themselves."""
    read, made = set[int](), set[int]()
    for layer in module.modules():
        own = {name: tuple(value.shape) for name, value in layer.named_parameters(recurse=False)}
        kernels = [shape for shape in own.values() if len(shape) > 1]
        transposed = getattr(layer, "transposed", False)
        for first, second, *_ in kernels:
            groups = getattr(layer, "groups", 1)
            inputs, outputs = (first, second * groups) if transposed else (second * groups, first)
            read.add(inputs)
            made.add(outputs)
        if own and not kernels:
            read |= {shape[0] for shape in own.values() if shape}
    return read - made or read


def _values(call: ModuleCall) -> list[Tensor]:
    """The values in a module's own forward."""
    children = [(child.args, child.kwargs, child.output) for child in call.children]
    own = [tensor for node in call.nodes for tensor in tensors_at(node)]
    return [*tensors_of((call.args, call.kwargs, call.output, children)), *own]
