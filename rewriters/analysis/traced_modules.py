"""Trace the modules whose own forward has to be rewritten: those that take statistics across channels or hold sizes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor, fx, nn

from rewriters.analysis.result import Analysis
from rewriters.analysis.size_holders import knows_its_sizes, may_hold_size, sizes_to_read, takes_sizes
from rewriters.analysis.trial_rewrites import pin_unresizable
from rewriters.cross_channel import StatisticSite, find_statistics, plain_statistics
from rewriters.errors import TraceError
from rewriters.forwards import TracedForward, patches_held, told_apart, trace_modes
from rewriters.labelling import ALWAYS, Labelled, Labelling, merge_grids
from rewriters.labelling.rules import LabelledStatistic
from rewriters.recording import Capture, ModuleCall, all_tensors, leaves_of, tensors_at, without_caches

_UNLIKE = "its calls take different paths, which its arguments don't tell apart"


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
    """The statistics of a module; those of calls that take the same way through its forward are coupled.

    Raises:
        TraceError: a statistic has no form over live channels, or the arguments don't tell the ways apart.
    """
    module, path = model.get_submodule(calls[0][1].path), calls[0][1].path
    ways: dict[str, list[tuple[StatisticSite, Mapping[bool, fx.Graph], int]]] = {}
    for captured, call in calls:
        traced = traces[id(call)] = trace_modes(module, call, captured, labelling, known)
        graphs, count = {mode: one.graph for one in traced for mode in one.modes}, len(statistics[id(call)])
        found = find_statistics(module, path, [graphs], [count])
        ways.setdefault("".join(one.code for one in traced), []).append((found, graphs, count))
    for (first, *_), *others in ways.values():
        for other, *_ in others:
            for mine, theirs in zip(first.statistics, other.statistics, strict=True):
                labelling.space.merge(mine.labels, theirs.labels)
    _, every, counts = zip(*(same[0] for same in ways.values()), strict=True)
    site = find_statistics(module, path, every, counts)
    if not all(map(told_apart, site.graphs.values())):
        raise TraceError(_UNLIKE, where=path)
    return site


def trace_size_holders(
    model: nn.Module, analysis: Analysis, known: Mapping[int, Labelled], traces: Mapping[int, list[TracedForward]]
) -> None:
    """Trace the modules in which a call that may hold a size meets channels that can be removed.

    Forwards that were traced for their statistics are included, for a norm may be written in ops that hold no size.
    """
    done = dict(traces)
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
                done[id(call)] = traced
            except TraceError as error:
                done[id(call)] = []
                for node in holders:
                    analysis.labelling.pin_values(tensors_at(node), known, call.path, str(node.target), error.cause)
    _trace_other_calls(model, analysis, known, done)


def _trace_other_calls(
    model: nn.Module, analysis: Analysis, known: Mapping[int, Labelled], done: Mapping[int, list[TracedForward]]
) -> None:
    """Trace the calls without a size of modules whose other calls hold one: the rewritten forward runs for all."""
    paths = {traced.path for traced in analysis.traced}
    for captured in analysis.captures:
        for call in captured.calls():
            if call.path in paths and id(call) not in done:
                module = model.get_submodule(call.path)
                try:
                    analysis.traced += trace_modes(module, call, captured, analysis.labelling, known)
                except TraceError as error:
                    _pin_calls(analysis, [one for one in analysis.traced if one.path == call.path], error.cause)


def merge_repeated_calls(analysis: Analysis) -> None:
    """Couple the channels in those calls of a module that take the same way through its forward: one code serves them.

    Calls that take other ways are cases of their own. If their arguments don't tell them apart, channels are pinned.
    """
    ways: dict[tuple[str, bool], dict[str, TracedForward]] = {}
    for traced, mode in ((one, mode) for one in analysis.traced for mode in one.modes):
        own = ways.setdefault((traced.path, mode), {})
        other = own.setdefault(traced.code, traced)
        if other is not traced:
            _merge_calls(analysis.labelling, other, traced)
    for cases in ways.values():
        if len(cases) > 1 and not told_apart([one.graph for one in cases.values()]):
            _pin_calls(analysis, [*cases.values()], _UNLIKE)


def _merge_calls(labelling: Labelling, first: TracedForward, second: TracedForward) -> None:
    for one, other in zip(first.graph.nodes, second.graph.nodes, strict=True):
        for a, b in zip(leaves_of(one.meta.get("val")), leaves_of(other.meta.get("val")), strict=True):
            if isinstance(a, Tensor) and isinstance(b, Tensor):
                labelling.merge_values(first.known.get(id(a)), second.known.get(id(b)), first.path)


def _pin_calls(analysis: Analysis, calls: Iterable[TracedForward], reason: str) -> None:
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
