"""Trace the modules whose own forward has to be rewritten: those that take statistics across channels or hold sizes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, fx, nn

from rewriters.analysis.result import Analysis
from rewriters.analysis.size_holders import knows_its_sizes, may_hold_size, sizes_to_read, takes_sizes
from rewriters.analysis.trial_rewrites import pin_unresizable
from rewriters.cross_channel import StatisticSite, find_statistics, one_site, plain_statistics
from rewriters.errors import TraceError
from rewriters.forwards import TracedForward, graphs_by_mode, patches_held, trace_modes
from rewriters.labelling import ALWAYS, Labelled, Labelling, merge_grids
from rewriters.labelling.rules import LabelledStatistic
from rewriters.recording import Capture, ModuleCall, all_tensors, leaves_of, tensors_at, without_caches


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
    modes = _own_modes(analysis.captures)
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


def _own_modes(captures: Sequence[Capture]) -> dict[int, bool]:
    """The mode to trace a call in, by the call's id, where the module was recorded in eval and in train mode."""
    paths = [{call.path for call in captured.calls()} for captured in captures]
    both = set.intersection(*paths) if len(paths) > 1 else set[str]()
    modes = zip((False, True), captures, strict=False)
    return {id(call): mode for mode, captured in modes for call in captured.calls() if call.path in both}


def _site(
    model: nn.Module, calls: list[tuple[Capture, ModuleCall]], statistics: Mapping[int, list[LabelledStatistic]],
    labelling: Labelling, known: Mapping[int, Labelled], traces: dict[int, list[TracedForward]],
    modes: Mapping[int, bool],
) -> StatisticSite:  # fmt: skip
    """The statistics of a module, whose calls must be equal and are coupled. Raises `TraceError` if they differ."""
    module, path = model.get_submodule(calls[0][1].path), calls[0][1].path
    found: list[StatisticSite] = []
    for captured, call in calls:
        traced = traces[id(call)] = trace_modes(module, call, captured, labelling, known, modes.get(id(call)))
        found.append(
            find_statistics(module, path, graphs_by_mode(traced, lambda one: one.graph), len(statistics[id(call)]))
        )
    site = one_site(found)
    for other in found[1:]:
        for mine, theirs in zip(site.statistics, other.statistics, strict=True):
            labelling.space.merge(mine.labels, theirs.labels)
    return site


def trace_size_holders(
    model: nn.Module, analysis: Analysis, known: Mapping[int, Labelled], traces: Mapping[int, list[TracedForward]]
) -> None:
    """Trace the modules in which a call that may hold a size meets channels that can be removed.

    Forwards that were traced for their statistics are included, for a norm may be written in ops that hold no size.
    """
    modes = _own_modes(analysis.captures)
    every = [
        (captured, call)
        for captured in analysis.captures
        for call in captured.calls()
        if _may_change(model.get_submodule(call.path), call, analysis.labelling)
    ]
    holders = {id(call): _holders(model.get_submodule(call.path), call, analysis.labelling, known) for _, call in every}
    rewritten = {call.path for _, call in every if id(call) in modes and (holders[id(call)] or id(call) in traces)}
    refused: dict[str, TraceError] = {}
    for captured, call in every:
        if not (holders[id(call)] or id(call) in traces or call.path in rewritten):
            continue
        module, mode = model.get_submodule(call.path), modes.get(id(call))
        try:
            traced = traces.get(id(call)) or trace_modes(module, call, captured, analysis.labelling, known, mode)
            analysis.traced.extend(traced)
        except TraceError as error:
            refused[call.path] = error
            _pin_holders(analysis.labelling, call, holders[id(call)], known, error)
    apart = refused.keys() & rewritten  # a forward that is rewritten in one mode has to be in the other
    analysis.traced = [traced for traced in analysis.traced if traced.path not in apart]
    for _, call in every:
        if call.path in apart:
            _pin_holders(analysis.labelling, call, holders[id(call)], known, refused[call.path])


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
    """Couple the channels in all calls of a module that is called several times, so that one rewritten forward will do.

    If its calls take different paths through its forward, no rewriting serves them all, and the channels are pinned.
    """
    first: dict[tuple[str, bool], TracedForward] = {}
    for traced, mode in ((one, mode) for one in analysis.traced for mode in one.modes):
        other = first.setdefault((traced.path, mode), traced)
        if other is not traced:
            alike = str(other.graph) == str(traced.graph)
            _merge_calls(analysis.labelling, other, traced) if alike else _pin_calls(analysis, other, traced)


def _merge_calls(labelling: Labelling, first: TracedForward, second: TracedForward) -> None:
    for one, other in zip(first.graph.nodes, second.graph.nodes, strict=True):
        for a, b in zip(leaves_of(one.meta.get("val")), leaves_of(other.meta.get("val")), strict=True):
            if isinstance(a, Tensor) and isinstance(b, Tensor):
                labelling.merge_values(first.known.get(id(a)), second.known.get(id(b)), first.path)


def _pin_calls(analysis: Analysis, *calls: TracedForward) -> None:
    reason = "its calls take different paths, which would need different code"
    for traced in calls:
        analysis.labelling.pin_values(all_tensors(traced.graph), traced.known, traced.path, "forward", reason)


def trace_calls(model: nn.Module, analysis: Analysis, path: str) -> bool:
    """Trace a module in which no op holds a size, because its own code may (`assert x.shape[1] == self.width`).

    Guards of sizes that slimming changes are left out of the rewritten forward.

    Returns:
        Whether the module was traced now, and had not been before.
    """
    if any(one.path == path for one in analysis.traced):
        return False
    known, found = analysis.labelling.by_tensor(), list[TracedForward]()
    calls = [(captured, call) for captured in analysis.captures for call in captured.calls() if call.path == path]
    modes = _own_modes(analysis.captures)
    try:
        with plain_statistics(model), without_caches(model), patches_held():
            for captured, call in calls:
                module, mode = model.get_submodule(path), modes.get(id(call))
                found += trace_modes(module, call, captured, analysis.labelling, known, mode)
    except TraceError:
        return False
    analysis.traced += found
    merge_repeated_calls(analysis)
    merge_grids(analysis.labelling)
    pin_unresizable(analysis.labelling, found)
    return bool(found)
