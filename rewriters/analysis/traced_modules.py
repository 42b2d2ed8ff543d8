"""Trace the modules whose own forward has to be rewritten: those that take statistics across channels or hold sizes."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from rewriters.analysis.analysis import Analysis
from rewriters.analysis.size_holders import knows_its_sizes, may_hold_size, sizes_to_read, takes_sizes
from rewriters.analysis.trial_rewrites import pin_unwritable
from rewriters.cross_channel import Site, plain_statistics, site
from rewriters.errors import TraceError
from rewriters.forwards import Traced, by_mode, patches_held, trace_modes
from rewriters.labelling import ALWAYS, Labelled, Labelling, merge_grids
from rewriters.labelling.rules import Look
from rewriters.recording import Capture, ModuleCall, all_tensors, leaves_of, tensors_at, without_caches


def trace_statistics(model: nn.Module, analysis: Analysis, known: Mapping[int, Labelled]) -> dict[int, list[Traced]]:
    """Trace the modules that take statistics along labels that may die; returns the traces by the call's id.

    Where one can't be rewritten to take them over live channels, all that it looks at stays.
    """
    labelling = analysis.labelling
    looks = {id(call): _looks_in(labelling, call) for captured in analysis.captures for call in captured.calls()}
    every = [look for found in looks.values() for look in found]
    if not every:
        return {}
    number = labelling.class_of_label()
    calls_of: dict[str, list[tuple[Capture, ModuleCall]]] = {
        look.module: [] for look in every if (number[look.labels.numpy()] != ALWAYS).any()
    }
    for captured in analysis.captures:
        for call in captured.calls():
            if call.path in calls_of:
                calls_of[call.path].append((captured, call))
    traces: dict[int, list[Traced]] = {}
    for path, calls in sorted(calls_of.items()):
        try:
            analysis.sites.append(_site(model, calls, looks, labelling, known, traces))
        except TraceError as error:
            for look in (look for _, call in calls for look in looks[id(call)]):
                labelling.space.pin(look.labels, path, look.op, f"{look.reason}; {error.cause}")
    return traces


def _looks_in(labelling: Labelling, call: ModuleCall) -> list[Look]:
    return [look for node in call.nodes for look in labelling.looks.get(node, ())]


def _site(
    model: nn.Module, calls: list[tuple[Capture, ModuleCall]], looks: Mapping[int, list[Look]], labelling: Labelling,
    known: Mapping[int, Labelled], traces: dict[int, list[Traced]],
) -> Site:  # fmt: skip
    """What a module looks at in its calls, which have to be alike: their channels go alike (raises `TraceError`)."""
    module, path = model.get_submodule(calls[0][1].path), calls[0][1].path
    found: list[Site] = []
    for captured, call in calls:
        traced = traces[id(call)] = trace_modes(module, call, captured, labelling, known)
        found.append(site(module, path, by_mode(traced, lambda one: one.graph), len(looks[id(call)])))
    for other in found[1:]:
        if any(str(other.graphs[training]) != str(found[0].graphs[training]) for training in (False, True)):
            raise TraceError("called in several ways that would need different code", where=path)
        for mine, theirs in zip(found[0].looks, other.looks, strict=True):
            labelling.space.merge(mine.labels, theirs.labels)
    return found[0]


def trace_size_holders(
    model: nn.Module, analysis: Analysis, known: Mapping[int, Labelled], traces: Mapping[int, list[Traced]]
) -> None:
    """Trace the modules in which a call that may hold a size meets labels that may die.

    A norm may be composed of ops that hold none: what was traced for its statistics is looked through too.
    """
    for captured in analysis.captures:
        for call in captured.calls():
            module = model.get_submodule(call.path)
            by_place = any(look.places for look in _looks_in(analysis.labelling, call))
            if knows_its_sizes(module) and not by_place:
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
    """Let a module that is called several times do with one rewritten forward: channels go alike in all calls.

    Where its calls take different ways through its forward, no rewriting serves them all, and what passes
    through keeps its channels.
    """
    first: dict[tuple[str, bool], Traced] = {}
    for traced, mode in ((one, mode) for one in analysis.traced for mode in one.modes):
        other = first.setdefault((traced.path, mode), traced)
        if other is not traced:
            alike = str(other.graph) == str(traced.graph)
            _merge_calls(analysis.labelling, other, traced) if alike else _pin_calls(analysis, other, traced)


def _merge_calls(labelling: Labelling, first: Traced, second: Traced) -> None:
    for one, other in zip(first.graph.nodes, second.graph.nodes, strict=True):
        for a, b in zip(leaves_of(one.meta.get("val")), leaves_of(other.meta.get("val")), strict=True):
            if isinstance(a, Tensor) and isinstance(b, Tensor):
                labelling.merge_values(first.known.get(id(a)), second.known.get(id(b)), first.path)


def _pin_calls(analysis: Analysis, *calls: Traced) -> None:
    reason = "called in several ways that would need different code"
    for traced in calls:
        analysis.labelling.pin_values(all_tensors(traced.graph), traced.known, traced.path, "forward", reason)


def trace_calls(model: nn.Module, analysis: Analysis, path: str) -> bool:
    """Trace a module in which no op holds a size, for its own code may (`assert x.shape[1] == self.width`).

    Returns:
        Whether that could be done, and had not been before.
    """
    if any(one.path == path for one in analysis.traced):
        return False
    known, found = analysis.labelling.by_tensor(), list[Traced]()
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
    pin_unwritable(analysis.labelling, found)
    return bool(found)
