"""Trace the modules whose own forward has to be rewritten: those that take statistics across channels or hold sizes."""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterable, Mapping, Sequence

from torch import Tensor, fx, nn

from rewriters.analysis.capture_modes import Inputs
from rewriters.analysis.own_code import find_own_code, is_open_ended
from rewriters.analysis.result import Analysis
from rewriters.analysis.size_holders import knows_its_sizes, may_hold_size, sizes_to_read, takes_sizes
from rewriters.analysis.trial_rewrites import pin_unresizable
from rewriters.cross_channel import StatisticSite, find_statistics, plain_statistics, take_alike
from rewriters.errors import TraceError
from rewriters.forwards import NOT_TOLD_APART, TracedForward, guard, patches_held, told_apart, trace_modes
from rewriters.labelling import ALWAYS, Labelled, Labelling, merge_grids
from rewriters.labelling.rules import LabelledStatistic
from rewriters.recording import (
    Capture,
    ModuleCall,
    all_tensors,
    leaves_of,
    named_modules,
    tensors_at,
    without_caches,
)


def trace_statistics(
    model: nn.Module, analysis: Analysis, known: Mapping[int, Labelled]
) -> dict[int, list[TracedForward]]:
    """Trace the modules that take statistics across channels that can be removed; returns the traces by call id.

    If every statistic in a module is one call that has a form over the live channels, its channels are free. If not,
    they are pinned, with the reason.
    """
    labelling = analysis.labelling
    statistics = {
        id(call): statistics_in(labelling, call) for captured in analysis.captures for call in captured.calls()
    }
    every = [statistic for found in statistics.values() for statistic in found]
    if not every:
        return {}
    class_of = labelling.class_of_label()
    calls_of: dict[str, list[tuple[Capture, ModuleCall]]] = {
        statistic.module: [] for statistic in every if (class_of[statistic.labels.numpy()] != ALWAYS).any()
    }
    for captured in analysis.captures:
        for call in captured.calls():
            if call.path in calls_of:
                calls_of[call.path].append((captured, call))
    modes = _own_modes(analysis.recorded)
    traces: dict[int, list[TracedForward]] = {}
    for path, calls in sorted(calls_of.items()):
        try:
            analysis.sites.append(_site(model, calls, statistics, labelling, known, traces, modes))
        except TraceError as error:
            for statistic in (statistic for _, call in calls for statistic in statistics[id(call)]):
                labelling.space.pin(statistic.labels, path, statistic.op, f"{statistic.reason}; {error.cause}")
    return traces


def statistics_in(labelling: Labelling, call: ModuleCall) -> list[LabelledStatistic]:
    return [statistic for node in call.nodes for statistic in labelling.statistics.get(node, ())]


def _own_modes(recorded: Sequence[Sequence[Capture]]) -> dict[int, bool]:
    """The mode to trace a call in, by the call's id, where its example was recorded in eval and in train mode.

    Not for every example may the model be recorded in train mode: where it isn't, one call is traced for both.
    """
    modes: dict[int, bool] = {}
    for captures in recorded:
        calls = [(mode, call) for mode, one in zip((False, True), captures, strict=False) for call in one.calls()]
        both = {call.path for mode, call in calls if mode} & {call.path for mode, call in calls if not mode}
        modes |= {id(call): mode for mode, call in calls if call.path in both}
    return modes


def _site(
    model: nn.Module, calls: list[tuple[Capture, ModuleCall]], statistics: Mapping[int, list[LabelledStatistic]],
    labelling: Labelling, known: Mapping[int, Labelled], traces: dict[int, list[TracedForward]],
    modes: Mapping[int, bool],
) -> StatisticSite:  # fmt: skip
    """The statistics of a module; those of calls that take the same way through its forward are coupled.

    Raises:
        TraceError: a statistic has no form over live channels, or the arguments don't tell the ways apart.
    """
    module, path = model.get_submodule(calls[0][1].path), calls[0][1].path
    ways: list[StatisticSite] = []
    taken: dict[tuple[bool, str], StatisticSite] = {}
    for captured, call in calls:
        traced = traces[id(call)] = trace_modes(module, call, captured, labelling, known, modes.get(id(call)))
        codes = {mode: (mode, one.code) for one in traced for mode in one.modes}
        graphs, count = {mode: one.graph for one in traced for mode in one.modes}, len(statistics[id(call)])
        found = find_statistics(module, path, [graphs], [count])
        for code in (code for code in codes.values() if code in taken):
            _couple(labelling, taken[code], found)
        new = {mode: graph for mode, graph in graphs.items() if codes[mode] not in taken}
        if new:
            ways.append(find_statistics(module, path, [new], [count]))
            taken |= {codes[mode]: ways[-1] for mode in new}
    every = _in_both_modes(ways, labelling)
    site = find_statistics(module, path, every, [_count(way) for way in every])
    if not all(map(told_apart, site.graphs.values())):
        raise TraceError(NOT_TOLD_APART, where=path)
    return site


def _couple(labelling: Labelling, first: StatisticSite, second: StatisticSite) -> None:
    for mine, theirs in zip(first.statistics, second.statistics, strict=True):
        labelling.space.merge(mine.labels, theirs.labels)


def _count(way: Mapping[bool, fx.Graph]) -> int:
    return sum(len(node.meta.get("statistics", ())) for node in next(iter(way.values())).nodes)


def _in_both_modes(ways: list[StatisticSite], labelling: Labelling) -> list[Mapping[bool, fx.Graph]]:
    """The traces of each way. One of eval mode and one of train mode that take alike statistics are one way."""
    joined: list[Mapping[bool, fx.Graph]] = []
    while ways:
        first, *ways = ways
        own: Mapping[bool, fx.Graph] = first.ways[0]
        other = next((one for one in ways if not own.keys() & one.ways[0].keys() and take_alike(first, one)), None)
        if other is not None:
            ways.remove(other)
            _couple(labelling, first, other)
            own = {**own, **other.ways[0]}
        joined.append(own)
    return joined


def trace_size_holders(
    model: nn.Module, analysis: Analysis, known: Mapping[int, Labelled], traces: Mapping[int, list[TracedForward]],
    inputs: Sequence[Inputs], looping: Collection[str] = (),
) -> None:  # fmt: skip
    """Trace the modules in which a call that may hold a size meets channels that can be removed.

    Forwards that were traced for their statistics are included, for a norm may be written in ops that hold no size. So
    are all other calls of such a module: the rewritten forward runs for them too.
    """
    modules = dict(named_modules(model))
    every = [
        (captured, call)
        for captured in analysis.captures
        for call in captured.calls()
        if _may_change(modules[call.path], call, analysis.labelling)
    ]
    holders = {id(call): _holders(modules[call.path], call, analysis.labelling, known) for _, call in every}
    rewritten = {call.path for _, call in every if holders[id(call)] or id(call) in traces}
    calls = [(captured, call) for captured, call in every if call.path in rewritten]
    plain = {call.path for _, call in calls if not statistics_in(analysis.labelling, call)}
    plain -= {call.path for _, call in calls if id(call) in traces}
    open_ended = plain & {call.path for _, call in calls if is_open_ended(modules[call.path], call)}
    refused = _trace(model, analysis, [one for one in calls if one[1].path not in open_ended], known, traces)
    tried = open_ended | (plain & (refused.keys() | (_with_loops(analysis.traced) & set(looping))))
    own = find_own_code(model, analysis.recorded, analysis.labelling, inputs, tried)
    analysis.own_code += own
    analysis.traced = [traced for traced in analysis.traced if traced.path not in {one.path for one in own}]
    left = open_ended - {one.path for one in own}
    refused |= _trace(model, analysis, [one for one in calls if one[1].path in left], known, traces)
    for path in {one.path for one in own}:
        refused.pop(path, None)
    for _, call in calls:
        if call.path in refused:
            _pin_holders(analysis.labelling, call, holders[id(call)], known, refused[call.path])


def _with_loops(traced: Iterable[TracedForward]) -> set[str]:
    """Modules whose forwards loop as often as their inputs have entries, and decide nothing else by these."""
    numbers: dict[str, set[type]] = {}
    for one in traced:
        guards = (node.args[0] for node in one.graph.nodes if node.target is guard)
        decided = (node.meta["val"] for node in guards if isinstance(node, fx.Node) and node.target is not operator.is_)
        numbers.setdefault(one.path, set()).update(map(type, decided))
    return {path for path, types in numbers.items() if types == {int}}


def looping_like(model: nn.Module, analysis: Analysis, path: str) -> set[str]:
    """The module at `path` and others of its class, if it was traced for as many rounds as its inputs have entries."""
    loops = _with_loops(analysis.traced)
    modules = dict(named_modules(model))
    return {other for other in loops if type(modules[other]) is type(modules[path])} if path in loops else set()


def _trace(
    model: nn.Module, analysis: Analysis, calls: Iterable[tuple[Capture, ModuleCall]], known: Mapping[int, Labelled],
    traces: Mapping[int, list[TracedForward]],
) -> dict[str, TraceError]:  # fmt: skip
    """Trace modules in each of their calls; returns why some could not be traced."""
    modes = _own_modes(analysis.recorded)
    found: list[TracedForward] = []
    refused: dict[str, TraceError] = {}
    for captured, call in calls:
        module, mode = model.get_submodule(call.path), modes.get(id(call))
        try:
            found += traces.get(id(call)) or trace_modes(module, call, captured, analysis.labelling, known, mode)
        except TraceError as error:
            refused[call.path] = error
    analysis.traced += [traced for traced in found if traced.path not in refused]
    return refused


def _pin_holders(
    labelling: Labelling, call: ModuleCall, holders: list[fx.Node], known: Mapping[int, Labelled], error: TraceError
) -> None:
    for node in holders:
        labelling.pin_values(tensors_at(node), known, call.path, str(node.target), error.cause)


def _may_change(module: nn.Module, call: ModuleCall, labelling: Labelling) -> bool:
    """Whether slimming may change what a module's own forward has to do, besides the fields that it reads."""
    return not knows_its_sizes(module) or any(statistic.by_position for statistic in statistics_in(labelling, call))


def _holders(module: nn.Module, call: ModuleCall, labelling: Labelling, known: Mapping[int, Labelled]) -> list[fx.Node]:
    """The calls in a module's own forward that may hold a size."""
    holders = [node for node in call.nodes if takes_sizes(node, module)]
    readable = sizes_to_read(labelling, call, known) if holders else set()
    return [node for node in holders if may_hold_size(labelling, node, readable)]


def merge_repeated_calls(analysis: Analysis) -> None:
    """Couple the channels in those calls of a module that take the same way through its forward: one code serves them.

    Calls that take other ways are cases of their own. If their arguments don't tell them apart, channels are pinned.
    """
    ways: dict[tuple[str, bool], dict[str, TracedForward]] = {}
    for traced, mode in ((one, mode) for one in analysis.traced for mode in one.modes):
        other = ways.setdefault((traced.path, mode), {}).setdefault(traced.code, traced)
        if other is not traced:
            _merge_calls(analysis.labelling, other, traced)
    for cases in ways.values():
        if not told_apart([one.graph for one in cases.values()]):
            for traced in cases.values():
                tensors = all_tensors(traced.graph)
                analysis.labelling.pin_values(tensors, traced.known, traced.path, "forward", NOT_TOLD_APART)


def _merge_calls(labelling: Labelling, first: TracedForward, second: TracedForward) -> None:
    for one, other in zip(first.graph.nodes, second.graph.nodes, strict=True):
        for a, b in zip(leaves_of(one.meta.get("val")), leaves_of(other.meta.get("val")), strict=True):
            if isinstance(a, Tensor) and isinstance(b, Tensor):
                labelling.merge_values(first.known.get(id(a)), second.known.get(id(b)), first.path)


def trace_calls(model: nn.Module, analysis: Analysis, path: str) -> bool:
    """Trace a module in which no op holds a size, because its own code may (`assert x.shape[1] == self.width`).

    Guards of sizes that slimming changes are left out of the rewritten forward.

    Returns:
        Whether the module was traced now, and had not been before.
    """
    if any(one.path == path for one in analysis.traced):
        return False
    analysis.own_code = [one for one in analysis.own_code if one.path != path]
    try:
        found = traces_of(model, analysis, path, analysis.labelling)
    except TraceError:
        return False
    analysis.traced += found
    merge_repeated_calls(analysis)
    merge_grids(analysis.labelling)
    analysis.resized |= pin_unresizable(analysis.labelling, found)
    return bool(found)


def traces_of(model: nn.Module, analysis: Analysis, path: str, labelling: Labelling) -> list[TracedForward]:
    """Trace all recorded calls of the module at `path`.

    Args:
        model: as it was analysed.
        analysis: of that model.
        path: the module.
        labelling: that of the analysis, or a fork of it; a trace may couple labels.

    Raises:
        TraceError: its forward can't be traced.
    """
    module, known, modes = model.get_submodule(path), labelling.by_tensor(), _own_modes(analysis.recorded)
    with plain_statistics(model), without_caches(model), patches_held():
        return [
            traced
            for captured in analysis.captures
            for call in captured.calls()
            if call.path == path
            for traced in trace_modes(module, call, captured, labelling, known, modes.get(id(call)))
        ]
