"""Remove dead branches.

If every input channel of a layer is dead, its output is the same for every input: its bias, as the norm and activation
that follow change it. Where such a value meets the rest of the network element by element (a residual add, a gate), a
constant for each channel replaces it. Where a whole operand of a concatenation is dead, the operand is dropped. What
computed them isn't called any more.

Both are done in the forward of the one module in which the branch meets the rest. A branch that can't be removed this
way (its value differs from position to position, a padded convolution follows, its module is called several times or
keeps its own code for what it gets through `**kwargs`) stays, one channel wide.
"""

from __future__ import annotations

import itertools
from collections import ChainMap, Counter
from collections.abc import Iterable, Iterator, Mapping, MutableMapping, Set
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_map_only

from rewriters.analysis import Analysis, is_open_ended
from rewriters.errors import SurgeryError, TraceError
from rewriters.forwards import (
    GUARDS,
    CannotResizeError,
    Graphs,
    LabelMask,
    TracedForward,
    bind_arguments,
    graphs_by_mode,
    out_of_place,
    placeholder_values,
    sweep,
    trace_modes,
)
from rewriters.labelling import Labelled, keeps_classes
from rewriters.labelling.rules import elementwise, find_rule
from rewriters.outputs import run_eval
from rewriters.recording import Capture, ModuleCall, tensors_of
from rewriters.slimming.constant_values import Meeting, constant_nodes, meetings, one_position, uniform


@dataclass(frozen=True, eq=False)
class Pruned:
    """A module's forward without its dead branches.

    Attributes:
        path: the module.
        graphs: its forward in train (True) and eval mode (False), rewritten for the channels that are left; it reads
            constants where the branches were.
        constants: a value for each channel, of size 1 along every other dimension, by buffer name.
        removed: modules that nothing calls any more, by path from the model's root.
        uniform: for each value at which a dead branch meets the rest, whether a constant replaces it.
    """

    path: str
    graphs: Graphs
    constants: Mapping[str, Tensor]
    removed: frozenset[str]
    uniform: tuple[bool, ...]


def prune_branches(
    model: nn.Module, analysis: Analysis, live: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any],
    decided: Mapping[str, tuple[bool, ...]] | None = None,
) -> list[Pruned]:  # fmt: skip
    """Forwards without dead branches, for the classes in `live` (bool, shape (classes,)).

    If there is a branch to remove, the model runs on the example inputs, to read the constants. If `decided` says what
    was found in every module (`Pruned.uniform`), nothing runs and constants are zero.
    """
    mask = analysis.label_mask(live)
    constant, varying = constant_nodes(analysis, live)
    times = Counter(call.path for call in analysis.captures[0].calls())
    unlike = _run_differently(analysis) | {one.path for one in analysis.own_code}
    found = [
        pruned
        for call in _meeting_calls(analysis, constant, mask)
        if times[call.path] == 1 and call.path not in unlike and (decided is None or call.path in decided)
        if not is_open_ended(model.get_submodule(call.path), call)
        for pruned in _prune(model, analysis, call, (constant, varying), live, args, kwargs, decided)
    ]
    gone = frozenset[str]().union(*(pruned.removed for pruned in found))
    found = [replace(one, removed=_outermost(one.removed)) for one in found if not is_under(one.path, gone)]
    if not found or decided is not None:
        return found
    missed = _read_elsewhere(model, found, args, kwargs)
    return [one for one in found if not one.removed & missed]


def _run_differently(analysis: Analysis) -> set[str]:
    """Modules that other example inputs have run otherwise than the first: a removed branch would be missing there."""
    if len(analysis.recorded) == 1:
        return set()
    ran = [Counter((call.path, _ops_in(call)) for call in captured.calls()) for captured in analysis.in_eval_mode]
    ways = {(traced.path, traced.code) for traced in analysis.traced if False in traced.modes}
    several = {path for path, count in Counter(path for path, _ in ways).items() if count > 1}
    return several | {path for other in ran[1:] for path, _ in (ran[0] - other) + (other - ran[0])}


def _ops_in(call: ModuleCall) -> tuple[Any, ...]:
    return tuple(node.target for inner in call.walk() for node in inner.nodes)


def _read_elsewhere(
    model: nn.Module, found: list[Pruned], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> set[str]:
    """Those of the modules to remove that code reads which isn't rewritten.

    `nn.TransformerEncoder` reads `batch_first` from its first layer's attention.
    """
    paths = {module: path for path, module in model.named_modules()}
    gone = frozenset[str]().union(*(one.removed for one in found))
    rewritten = {one.path for one in found}
    running, read = [""], set[str]()
    plain_call, plain_read = nn.Module.__call__, nn.Module.__getattr__

    def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        running.append(paths.get(module, running[-1]))
        try:
            return plain_call(module, *args, **kwargs)
        finally:
            running.pop()

    def noted(module: nn.Module, name: str) -> Any:
        value = plain_read(module, name)
        path = paths.get(value) if isinstance(value, nn.Module) else None
        if path in gone and running[-1] not in rewritten:
            read.add(path)
        return value

    with mock.patch.object(nn.Module, "__call__", call), mock.patch.object(nn.Module, "__getattr__", noted):
        run_eval(model, args, kwargs)
    return read


def is_under(path: str, paths: Set[str]) -> bool:
    """Whether a module's or tensor's path is one of `paths` or inside one of them."""
    return any(f"{path}.".startswith(f"{other}.") for other in paths)


def _holds_any(path: str, names: Set[str]) -> bool:
    """Whether an attribute with one of these names is in a module."""
    return any(is_under(name, {path}) for name in names)


def _outermost(paths: Set[str]) -> frozenset[str]:
    return frozenset(path for path in paths if not is_under(path, paths - {path}))


def _meeting_calls(analysis: Analysis, constant: set[fx.Node], mask: LabelMask) -> list[ModuleCall]:
    """Module calls in whose own code a constant value, or a dead operand, meets the rest."""
    calls: dict[int, ModuleCall] = {}
    for node in analysis.captures[0].graph.nodes:
        if node.op == "call_function" and node.meta["call"] is not None:
            sources = set(node.all_input_nodes)
            meets = find_rule(node.target) is elementwise.elementwise and node not in constant and sources & constant
            is_cat = node.target is torch.ops.aten.cat.default
            if meets or (is_cat and any(_is_dead(analysis.labelling.values[source], mask) for source in sources)):
                calls[id(node.meta["call"])] = node.meta["call"]
    return list(calls.values())


def _is_dead(value: Any, mask: LabelMask) -> bool:
    return isinstance(value, Labelled) and 0 in mask.shape(value) and 0 not in value.shape


def _prune(
    model: nn.Module, analysis: Analysis, call: ModuleCall, nodes: tuple[set[fx.Node], set[fx.Node]], live: Tensor,
    args: tuple[Any, ...], kwargs: Mapping[str, Any], decided: Mapping[str, tuple[bool, ...]] | None,
) -> Iterator[Pruned]:  # fmt: skip
    captured, labelling = analysis.captures[0], analysis.labelling.fork()
    module = model.get_submodule(call.path)
    try:
        traced = trace_modes(module, call, captured, labelling, labelling.by_tensor())
    except TraceError:
        return
    if not keeps_classes(labelling, analysis.labelling):
        return  # the trace couples channels that are free in the captured model
    if call.path in {one.path for one in analysis.sites}:
        return  # its traced forward takes statistics over all channels, so its values would be wrong
    mask = LabelMask(labelling.stays(live))
    ids = [{id(leaf) for node in some for leaf in tensors_of(node.meta.get("val"))} for some in nodes]
    met = [meetings(one.graph, *ids) for one in traced]
    values: list[Tensor | None] = []
    if len({len(found) for found in met}) == 1 and met[0]:
        labels = [traced[0].known[id(one.value.meta["val"])] for one in met[0]]
        if decided is None:
            with analysis.live_statistics(model, live):
                probed = _probe(model, call.path, traced[0].graph, [one.value.name for one in met[0]], args, kwargs)
            values = list(map(uniform, probed, labels))
        else:
            chosen = _as_decided(met[0], decided, call)
            values = [_zero(one, own) if put else None for (one, put), own in zip(chosen, labels, strict=True)]
    forwards = [_with_constants(one, found, values) for one, found in zip(traced, met, strict=True)]
    try:
        graphs = graphs_by_mode(forwards, lambda one: _without_guards(one.resize(mask).graph, call))
    except CannotResizeError:  # an op fails on tensors without channels
        return
    removed = _uncalled(call, analysis.captures, itertools.chain(*graphs.values()))
    if removed:
        named = {_constant_name(index): value for index, value in enumerate(values) if value is not None}
        constants = {
            node.target: mask.slim(named[node.target], forwards[0].known[id(node.meta["val"])])
            for node in forwards[0].graph.nodes
            if node.op == "get_attr" and node.target in named
        }
        yield Pruned(call.path, graphs, constants, removed, tuple(value is not None for value in values))


class _Values(fx.Interpreter):
    """Runs a traced forward on the real module and keeps the values of some nodes."""

    def __init__(self, module: nn.Module, graph: fx.Graph, names: list[str]):
        super().__init__(module, garbage_collect_values=False, graph=graph)
        self.found: dict[str, Tensor] = {}
        self._names = set(names)

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.name in self._names:
            self.found[n.name] = value.clone()  # an in-place op may follow
        return value


def _probe(
    model: nn.Module, path: str, graph: fx.Graph, names: list[str], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> list[Tensor]:
    """Values of the named nodes in a module's forward when the model runs on the example inputs."""
    module = model.get_submodule(path)
    values = _Values(module, graph, names)

    def run(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        arguments = tree_map_only(Tensor, torch.clone, bind_arguments(module, args, kwargs))
        values.run(initial_env=placeholder_values(graph, arguments))

    handle = module.register_forward_pre_hook(run, with_kwargs=True)
    try:
        run_eval(model, args, kwargs)
    finally:
        handle.remove()
    return [values.found[name] for name in names]


def _as_decided(
    met: list[Meeting], decided: Mapping[str, tuple[bool, ...]], call: ModuleCall
) -> Iterator[tuple[fx.Node, bool]]:
    """The values at which dead branches of a module meet the rest, each with its noted decision."""
    found = decided[call.path]
    if len(found) != len(met):
        raise SurgeryError(
            f"dead branches meet the rest at {len(met)} values, but {len(found)} were noted.",
            where=call.path,
        )
    return zip((one.value for one in met), found, strict=True)


def _zero(node: fx.Node, labels: Labelled) -> Tensor:
    """Zeros in the shape of the constant that replaces a node's value."""
    value: Tensor = node.meta["val"]
    return torch.zeros(one_position(value, labels).shape, dtype=value.dtype, device=value.device)


def _constant_name(index: int) -> str:
    return f"branch_constant_{index}"


def _with_constants(traced: TracedForward, met: list[Meeting], values: list[Tensor | None]) -> TracedForward:
    """The forward with constants instead of the nodes that have a value, without nodes that aren't used any more."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    graph.output(graph.graph_copy(traced.graph, copies))
    known: ChainMap[int, Labelled] = ChainMap({}, traced.known)  # type: ignore[arg-type]  # only the first is written
    used = [node for node in graph.nodes if node.users]
    for index, (one, value) in enumerate(zip(met, values, strict=False)):
        if value is not None:
            _put_constant(copies[one.value], [copies[user] for user in one.users], _constant_name(index), known)
    sweep(graph, used)
    return replace(traced, graph=graph, known=known)


def _put_constant(node: fx.Node, users: list[fx.Node], name: str, known: MutableMapping[int, Labelled]) -> None:
    """Make these users of `node` read a constant instead."""
    full: Tensor = node.meta["val"]
    with node.graph.inserting_after(node):
        constant = node.graph.create_node("get_attr", name)
    constant.meta["val"] = one_position(full, known[id(full)])
    known[id(constant.meta["val"])] = replace(known[id(full)], shape=tuple(constant.meta["val"].shape))
    for user in users:
        if user.args and user.args[0] is node:
            user.target = out_of_place(user.target)
        user.replace_input_with(node, constant)


def _without_guards(graph: fx.Graph, call: ModuleCall) -> fx.Graph:
    """The graph without the guards of attributes of modules that it doesn't call any more."""
    called = {node.target for node in graph.find_nodes(op="call_module")}
    under = f"{call.path}." if call.path else ""
    gone = {child.path.removeprefix(under) for child in call.children} - called
    for node in (node for target in GUARDS for node in graph.find_nodes(op="call_function", target=target)):
        read = node.args[0]
        if isinstance(read, fx.Node) and read.op == "get_attr" and is_under(str(read.target), gone):
            graph.erase_node(node)
            sweep(graph, [read])
    return graph


def _uncalled(call: ModuleCall, captures: Iterable[Capture], graphs: Iterable[fx.Graph]) -> frozenset[str]:
    """Modules called in `call` that neither the rewritten graphs call nor anything else (an opaque module, say)."""
    nodes = [node for graph in graphs for node in graph.nodes]
    still = {f"{call.path}.{node.target}".lstrip(".") for node in nodes if node.op == "call_module"}
    read = {f"{call.path}.{node.target}".lstrip(".") for node in nodes if node.op == "get_attr"}
    gone = {path for path in {child.path for child in call.children} - still if not _holds_any(path, read)}
    elsewhere: set[str] = set()
    for captured in captures:
        own = [child for other in captured.calls() if other.path == call.path for child in other.children]
        inside = {id(inner) for child in own if child.path in gone for inner in child.walk()}
        paths = {other.path for other in captured.calls() if id(other) not in inside}
        elsewhere |= paths.union(*(captured.opaque[path].inside for path in paths & captured.opaque.keys()))
    return frozenset(path for path in gone if not any(is_under(other, {path}) for other in elsewhere))
