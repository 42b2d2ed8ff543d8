"""From a model and example inputs to its channel map, with the proof that every class of it can go.

Forwards that hold sizes are traced and rewritten once for a trial pattern of dead classes, then the whole
slimming is tried in a dry run (`dry_run`). What cannot be written down is pinned here, before anything is
trained, and not found out at the end.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any
from unittest import mock

from torch import Tensor, fx, nn
from torch._subclasses import fake_tensor
from torch.utils._pytree import tree_map_only

from rewriters.analysis.trial_rewrites import pin_unwritable
from rewriters.cross_channel import Site, place, plain_statistics, site, statistics, take_off, write_live
from rewriters.errors import AutogateError, TraceError
from rewriters.forwards import LabelMask, Traced, by_mode, patches_held, trace_modes
from rewriters.labelling import ALWAYS, ChannelMap, Labelled, Labelling, varying
from rewriters.labelling.rules import Findings, Look, creation, find_rule, kernels, mixing, movement
from rewriters.recording import (
    Capture,
    ModuleCall,
    all_tensors,
    capture,
    leaves_of,
    set_modes,
    tensors_at,
    tensors_of,
    without_caches,
)
from rewriters.undo_log import UndoLog
from rewriters.verify import run_eval

_RULES_WITH_SIZES = (
    creation.create, mixing.group_norm, mixing.layer_norm, movement.channel_shuffle, movement.expand, movement.move,
    movement.pad, movement.reshape, movement.roll,
)  # fmt: skip
_TORCH_MODULES_WITH_SIZES = (
    nn.Unflatten, nn.ChannelShuffle, nn.MultiheadAttention, nn.modules.padding._ConstantPadNd,
)  # fmt: skip


@dataclass
class Analysis:
    """All that is known of a model's channels.

    Attributes:
        captures: recorded forwards, in eval mode and, where some layers run in train mode only, in that.
        labelling: labels of every tensor in them.
        traced: modules whose own forward may hold a size, traced.
        sites: modules whose own forward takes statistics along channels.
        channel_map: the partition.
    """

    captures: list[Capture]
    labelling: Labelling
    traced: list[Traced] = field(default_factory=list)
    sites: list[Site] = field(default_factory=list)
    channel_map: ChannelMap = field(init=False)

    @property
    def opaque(self) -> frozenset[str]:
        """Paths of the modules that couldn't be recorded."""
        return frozenset(path for captured in self.captures for path in captured.opaque)

    def label_mask(self, live: Tensor) -> LabelMask:
        """What stays of every tensor when the classes in `live` (bool, shape (classes,)) do."""
        return LabelMask(self.labelling.stays(live))

    def settle(self, samples: int) -> None:
        """Read the channel map off the labels, for a forward that was recorded on so many samples."""
        channel_map = self.labelling.channel_map(samples)
        looking = statistics(self.sites, self.labelling.numbering()) if self.sites else ()
        self.channel_map = replace(channel_map, statistics=looking)

    def place_statistics(self, model: nn.Module, undo_log: UndoLog) -> None:
        """Let statistics along channels be taken over the live ones, which are all of them until `write_live`."""
        place(model, self.sites, self.labelling.numbering(), undo_log)

    @contextlib.contextmanager
    def live_statistics(self, model: nn.Module, live: Tensor) -> Iterator[None]:
        """Inside, statistics are taken over the classes in `live` (bool, shape (classes,))."""
        undo_log = UndoLog()
        take_off(model, undo_log)
        self.place_statistics(model, undo_log)
        write_live(model, self.channel_map, live)
        try:
            yield
        finally:
            undo_log.undo()


def analyse(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None = None,
    ignore: Mapping[str, str] | None = None, embed: bool = True,
) -> Analysis:  # fmt: skip
    """Find the classes of coupled channels of `model`.

    Args:
        model: any module; nothing in it changes, but buffers that its forward makes anew for inputs of another
            size (a table of places): it is run once then, and once where a module in it can't be recorded. Where
            its statistics are taken over live channels, it is analysed as if they were not.
        args: example inputs by position.
        kwargs: example inputs by name.
        ignore: names of parameters and buffers to keep whole, with the reason.
        embed: whether channels that a norm across channels looks at may die.

    Raises:
        CaptureError: the forward fails, or its own control flow depends on the values of tensors.
    """
    with plain_statistics(model), without_caches(model):
        return _analyse(model, args, kwargs, ignore, embed)


def _analyse(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None, ignore: Mapping[str, str] | None,
    embed: bool,
) -> Analysis:  # fmt: skip
    captures = _capture_modes(model, args, kwargs)
    labelling = _labelled(model, captures, ignore, embed)
    if labelling.findings.scattered:
        larger = _capture_larger(model, args, kwargs, captures)
        if larger and not labelling.has_classes_of(_labelled(model, larger, ignore, embed)):
            labelling.space.notes += labelling.findings.scattered
    analysis = Analysis(captures, labelling)
    known = labelling.by_tensor()
    with patches_held():
        looking = _trace_statistics(model, analysis, known)
        _trace_size_holders(model, analysis, known, looking)
    _settle_repeated_calls(analysis)
    labelling.settle_grids()
    pin_unwritable(labelling, analysis.traced)
    analysis.settle(samples_in(args, kwargs))
    return analysis


def _labelled(model: nn.Module, captures: list[Capture], ignore: Mapping[str, str] | None, embed: bool) -> Labelling:
    """Labels of all values of a recorded model, before its forwards are traced."""
    labelling = Labelling(findings=Findings(live=embed))
    for captured in captures:
        labelling.run(captured, counted=captured is captures[0])
    for name, reason in (ignore or {}).items():
        labelling.pin_tensors([name], reason)
    labelling.settle_recurrent(model)
    labelling.settle_grids()
    labelling.settle_zeroed()
    return labelling


def samples_in(args: Any, kwargs: Any) -> int:
    """Length of the first dimension of the first tensor among the inputs."""
    tensors = [tensor for tensor in tensors_of((args, kwargs)) if tensor.ndim]
    return max(1, tensors[0].shape[0]) if tensors else 1


def _capture_modes(model: nn.Module, args: Any, kwargs: Any) -> list[Capture]:
    before = set_modes(model, False)
    try:
        captures = [capture(model, args, kwargs)]
        if captures[0].exchanged:
            run_eval(model, args, kwargs)  # from now on they are those that these inputs want
            captures = [capture(model, args, kwargs)]
        if _has_unseen_parameters(model, captures[0]):
            set_modes(model, True)
            captures.append(capture(model, args, kwargs))
    finally:
        set_modes(model, before)
    return captures


def _capture_larger(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None, captures: list[Capture]
) -> list[Capture]:
    """The same recordings for inputs twice as large; none where the model can't run on such."""
    args, kwargs = tree_map_only(Tensor, _twice_as_large, (tuple(args), dict(kwargs or {})))
    before = set_modes(model, False)
    try:
        larger = []
        with mock.patch.object(fake_tensor.log, "disabled", True):  # it logs what fails, which is nobody's error here
            for captured in captures:
                set_modes(model, captured is not captures[0])
                larger.append(capture(model, args, kwargs, captured.opaque))
        return larger
    except AutogateError:
        return []
    finally:
        set_modes(model, before)


def _twice_as_large(value: Tensor) -> Tensor:
    """For images (N, C, H, W), sequences (N, C, L) or volumes those twice as large, without values."""
    if value.ndim < 3 or not value.is_floating_point():
        return value
    return value.new_empty((*value.shape[:2], *(2 * size for size in value.shape[2:])))


def _has_unseen_parameters(model: nn.Module, captured: Capture) -> bool:
    """Whether a module with parameters wasn't called, nor any of these used by another."""
    seen = {call.path for call in captured.calls()}
    used = {node.target for node in captured.graph.nodes if node.op == "get_attr" and node.users}
    return any(
        path not in seen and own and used.isdisjoint(own)
        for path, module in model.named_modules()
        for own in [{f"{path}.{name}".lstrip(".") for name, _ in module.named_parameters(recurse=False)}]
    )


def _trace_statistics(model: nn.Module, analysis: Analysis, known: Mapping[int, Labelled]) -> dict[int, list[Traced]]:
    """Trace the modules that take statistics along labels that may die; returns the traces by the call's id.

    Where one can't be rewritten to take them over live channels, all that it looks at stays.
    """
    labelling = analysis.labelling
    looks = {id(call): _looks_in(labelling, call) for captured in analysis.captures for call in captured.calls()}
    every = [look for found in looks.values() for look in found]
    if not every:
        return {}
    number = labelling.numbering()
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


def _trace_size_holders(
    model: nn.Module, analysis: Analysis, known: Mapping[int, Labelled], traces: Mapping[int, list[Traced]]
) -> None:
    """Trace the modules in which a call that may hold a size meets labels that may die.

    A norm may be composed of ops that hold none: what was traced for its statistics is looked through too.
    """
    for captured in analysis.captures:
        for call in captured.calls():
            module = model.get_submodule(call.path)
            by_place = any(look.places for look in _looks_in(analysis.labelling, call))
            if _knows_its_sizes(module) and not by_place:
                continue
            holders = [node for node in call.nodes if _takes_sizes(node, module)]
            readable = _sizes_to_read(analysis.labelling, call, known) if holders else set()
            holders = [node for node in holders if _may_hold_size(analysis.labelling, node, readable)]
            if not holders and id(call) not in traces:
                continue
            try:
                traced = traces.get(id(call)) or trace_modes(module, call, captured, analysis.labelling, known)
                analysis.traced.extend(traced)
            except TraceError as error:
                for node in holders:
                    analysis.labelling.pin_values(tensors_at(node), known, call.path, str(node.target), error.cause)


def _settle_repeated_calls(analysis: Analysis) -> None:
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


def _knows_its_sizes(module: nn.Module) -> bool:
    """Whether a module takes every size from its fields, which slimming keeps up to date."""
    if isinstance(module, nn.GroupNorm) or hasattr(module, "normalized_shape"):
        return _follows_weight(module)
    own_size = isinstance(module, _TORCH_MODULES_WITH_SIZES)
    return type(module).__module__.startswith("torch.nn.modules") and not own_size


def _follows_weight(module: nn.Module) -> bool:
    """Whether the fields of a norm across channels say what shape its weight has, and so can follow it."""
    weight = getattr(module, "weight", None)
    shape = (module.num_channels,) if isinstance(module, nn.GroupNorm) else getattr(module, "normalized_shape", None)
    return isinstance(weight, Tensor) and isinstance(shape, (tuple, list)) and tuple(shape) == tuple(weight.shape)


def _sizes_to_read(labelling: Labelling, call: ModuleCall, known: Mapping[int, Labelled]) -> set[int]:
    """Lengths of what a module is given, along dimensions that slimming makes shorter: it may read them off it."""
    given = [known[id(leaf)] for leaf in leaves_of((call.args, call.kwargs)) if id(leaf) in known]
    mortal = [layer for value in given for layer in value.layers if not labelling.pinned(layer).all()]
    return {layer.shape[dim] for layer in mortal for dim in varying(layer)}


def _takes_sizes(node: fx.Node, module: nn.Module) -> bool:
    """Whether a call is one that takes numbers which slimming may change (a field that follows doesn't count)."""
    found = find_rule(node.target)
    if found is kernels.convolution:
        return node.args[8] > 1 and not isinstance(module, nn.modules.conv._ConvNd)
    return found in _RULES_WITH_SIZES


def _may_hold_size(labelling: Labelling, node: fx.Node, readable: set[int]) -> bool:
    """Whether a call that takes sizes may be given one that slimming changes.

    Args:
        readable: sizes that change and may have been read elsewhere in the forward, though all stays here.
    """
    found = find_rule(node.target)
    if found in (creation.create, movement.expand, movement.reshape) and readable & set(node.meta["val"].shape):
        return True
    if found is movement.pad:
        padded = {node.meta["val"].ndim - 1 - place // 2 for place, width in enumerate(node.args[1]) if width}
        layers = labelling.values[node.args[0]].layers
        if not any(padded & set(varying(layer)) for layer in layers):
            return False
    return any(not labelling.pinned(layer).all() for value in _labels_at(labelling, node) for layer in value.layers)


def _labels_at(labelling: Labelling, node: fx.Node) -> list[Labelled]:
    values = [labelling.values[source] for source in node.all_input_nodes] + [labelling.values[node]]
    return [value for value in leaves_of(values) if isinstance(value, Labelled)]


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
    _settle_repeated_calls(analysis)
    analysis.labelling.settle_grids()
    pin_unwritable(analysis.labelling, found)
    return bool(found)


def pin_call(analysis: Analysis, path: str, reason: str) -> None:
    """Keep all channels of what a module's own code touches, and of what goes into it and comes out."""
    known = analysis.labelling.by_tensor()
    for captured in analysis.captures:
        for call in captured.calls():
            if call.path == path:
                tensors = tensors_of((call.args, call.kwargs, call.output))
                tensors += [tensor for node in call.nodes for tensor in tensors_at(node)]
                analysis.labelling.pin_values(tensors, known, path, "forward", reason)
