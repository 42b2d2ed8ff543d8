"""Trace the modules whose own forward has to be rewritten: those that take statistics across channels or hold sizes."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from rewriters.analysis.result import Analysis
from rewriters.analysis.size_holders import knows_its_sizes, may_hold_size, sizes_to_read, takes_sizes
from rewriters.analysis.trial_rewrites import pin_unresizable
from rewriters.cross_channel import StatisticSite, find_statistics, plain_statistics
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
    traces: dict[int, list[TracedForward]] = {}
    for path, calls in sorted(calls_of.items()):
        try:
            analysis.sites.append(_site(model, calls, statistics, labelling, known, traces))
        except TraceError as error:
            for statistic in (statistic for _, call in calls for statistic in statistics[id(call)]):
                labelling.space.pin(statistic.labels, path, statistic.op, f"{statistic.reason}; {error.cause}")
    return traces


def statistics_in(labelling: Labelling, call: ModuleCall) -> list[LabelledStatistic]:
    return [statistic for node in call.nodes for statistic in labelling.statistics.get(node, ())]


def _site(
    model: nn.Module, calls: list[tuple[Capture, ModuleCall]], statistics: Mapping[int, list[LabelledStatistic]],
    labelling: Labelling, known: Mapping[int, Labelled], traces: dict[int, list[TracedForward]],
) -> StatisticSite:  # fmt: skip
    """The statistics of a module, whose calls must be equal and are coupled. Raises `TraceError` if they differ."""
    module, path = model.get_submodule(calls[0][1].path), calls[0][1].path
    found: list[StatisticSite] = []
    for captured, call in calls:
        traced = traces[id(call)] = trace_modes(module, call, captured, labelling, known)
        found.append(
            find_statistics(module, path, graphs_by_mode(traced, lambda one: one.graph), len(statistics[id(call)]))
        )
    for other in found[1:]:
        if any(str(other.graphs[training]) != str(found[0].graphs[training]) for training in (False, True)):
            raise TraceError("its calls take different paths, which would need different code", where=path)
        for mine, theirs in zip(found[0].statistics, other.statistics, strict=True):
            labelling.space.merge(mine.labels, theirs.labels)
    return found[0]


def trace_size_holders(
    model: nn.Module, analysis: Analysis, known: Mapping[int, Labelled], traces: Mapping[int, list[TracedForward]]
) -> None:
    """Trace the modules in which a call that may hold a size meets channels that can be removed.

    Forwards that were traced for their statistics are included, for a norm may be written in ops that hold no size.
    """
    for captured in analysis.captures:
        for call in captured.calls():
            module = model.get_submodule(call.path)
            by_position = any(statistic.by_position for statistic in statistics_in(analysis.labelling, call))
            if knows_its_sizes(module) and not by_position:
                continue
            holders = [node for node in call.nodes if takes_sizes(node, module)]
            readable = sizes_to_read(analysis.labelling, call, known) if holders else set()
            holders = [node for node in holders if may_hold_size(analysis.labelling, node, readable)]
            if not holders and id(call) not in traces:
                continue
            try:
                traced = traces.get(id(call)) or trace_modes(module, call, captured, analysis.labelling, known)
                analysis.traced.extend(traced)
            except TraceError as error:
                for node in holders:
                    analysis.labelling.pin_values(tensors_at(node), known, call.path, str(node.target), error.cause)


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
    try:
        with plain_statistics(model), without_caches(model), patches_held():
            for captured, call in calls:
                found += trace_modes(model.get_submodule(path), call, captured, analysis.labelling, known)
    except TraceError:
        return False
    analysis.traced += found
    merge_repeated_calls(analysis)
    merge_grids(analysis.labelling)
    pin_unresizable(analysis.labelling, found)
    return bool(found)
