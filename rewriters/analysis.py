"""From a model and example inputs to its channel map, with the proof that every class of it can go.

Forwards that hold sizes are traced and rewritten once for a trial pattern of dead classes, then the whole
slimming is rehearsed on fake tensors. What cannot be written down is pinned here, before anything is
trained, and not found out at the end.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from rewriters.capture import Capture, ModuleCall, capture
from rewriters.channel_map import ChannelMap
from rewriters.labels import Labelled
from rewriters.propagate import Labelling
from rewriters.resizing import Cut, Resizer, Unwritable
from rewriters.rules import find_rule, movement
from rewriters.rules.kernels import convolution
from rewriters.tracing import TraceError, trace

_HOLDS_SIZES = (movement.move, movement.reshape, movement.pad)


@dataclass(frozen=True, eq=False)
class Traced:
    """A module's own forward, traced in one mode for one of its calls."""

    path: str
    training: bool
    graph: fx.Graph
    known: Mapping[int, Labelled]

    def resize(self, cut: Cut) -> Resizer:
        """The forward rewritten for a cut (raises `Unwritable`)."""
        resizer = Resizer(self.graph, self.known, cut, self.path)
        resizer.run()
        return resizer


@dataclass
class Analysis:
    """All that is known of a model's channels.

    Attributes:
        captures: recorded forwards, in eval mode and, where some layers run in train mode only, in that.
        labelling: labels of every tensor in them.
        traced: modules whose own forward may hold a size, traced.
        channel_map: the partition.
    """

    captures: list[Capture]
    labelling: Labelling
    traced: list[Traced] = field(default_factory=list)
    channel_map: ChannelMap = field(init=False)

    def cut(self, live: Tensor) -> Cut:
        return Cut(self.labelling.stays(live))


def set_modes(model: nn.Module, modes: Mapping[nn.Module, bool] | bool) -> dict[nn.Module, bool]:
    """Set every module's train or eval mode; returns what they were, to be set again."""
    before = {module: module.training for module in model.modules()}
    for module in before:
        module.training = modes if isinstance(modes, bool) else modes[module]
    return before


def analyse(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None = None,
    ignore: Mapping[str, str] | None = None,
) -> Analysis:  # fmt: skip
    """Find the classes of coupled channels of `model`.

    Args:
        model: any module; nothing in it changes.
        args, kwargs: example inputs.
        ignore: names of parameters and buffers to keep whole, with the reason.

    Raises:
        CaptureError: the forward's control flow depends on the values of tensors.
    """
    captures = _capture_modes(model, args, kwargs)
    labelling = Labelling()
    for captured in captures:
        labelling.run(captured)
    for name, reason in (ignore or {}).items():
        labelling.pin_tensors([name], reason)
    labelling.settle_grids()
    analysis = Analysis(captures, labelling)
    _trace_size_holders(model, analysis)
    labelling.settle_grids()
    _pin_unwritable(analysis)
    analysis.channel_map = labelling.channel_map()
    return analysis


def _capture_modes(model: nn.Module, args: Any, kwargs: Any) -> list[Capture]:
    before = set_modes(model, False)
    try:
        captures = [capture(model, args, kwargs)]
        if _has_unseen_parameters(model, captures[0]):
            set_modes(model, True)
            captures.append(capture(model, args, kwargs))
    finally:
        set_modes(model, before)
    return captures


def _has_unseen_parameters(model: nn.Module, captured: Capture) -> bool:
    seen = {call.path for call in captured.calls()}
    return any(
        path not in seen and next(module.parameters(recurse=False), None) is not None
        for path, module in model.named_modules()
    )


def _trace_size_holders(model: nn.Module, analysis: Analysis) -> None:
    """Trace the modules in which a call that may hold a size meets labels that may die."""
    for captured in analysis.captures:
        known = analysis.labelling.by_tensor()
        for call in captured.calls():
            holders = [node for node in call.nodes if _may_hold_size(analysis.labelling, node)]
            module = model.get_submodule(call.path)
            if not holders or _knows_its_sizes(module):
                continue
            try:
                analysis.traced.extend(_trace_modes(module, call, captured, analysis.labelling, known))
            except TraceError as error:
                for node in holders:
                    _pin_values(analysis.labelling, _tensors_at(node), known, call.path, str(node.target), error.cause)


def _trace_modes(
    module: nn.Module, call: ModuleCall, captured: Capture, labelling: Labelling, known: Mapping[int, Labelled]
) -> list[Traced]:
    before = set_modes(module, False)
    try:
        traced = []
        for training in (False, True):
            module.training = training
            traced.append(Traced(call.path, training, *trace(module, call, captured, labelling, known)))
        return traced
    finally:
        set_modes(module, before)


def _knows_its_sizes(module: nn.Module) -> bool:
    """Whether a module takes every size from its fields, which slimming keeps up to date."""
    return type(module).__module__.startswith("torch.nn.modules") and not isinstance(module, nn.Unflatten)


def _may_hold_size(labelling: Labelling, node: fx.Node) -> bool:
    found = find_rule(node.target)
    grouped = found is convolution and node.args[8] > 1
    return (found in _HOLDS_SIZES or grouped) and any(
        not labelling.pinned(layer).all() for value in _labels_at(labelling, node) for layer in value.layers
    )


def _labels_at(labelling: Labelling, node: fx.Node) -> list[Labelled]:
    values = [labelling.values[source] for source in node.all_input_nodes] + [labelling.values[node]]
    return [value for value in tree_leaves(values) if isinstance(value, Labelled)]


def _tensors_at(node: fx.Node) -> list[Tensor]:
    values = [source.meta["val"] for source in node.all_input_nodes] + [node.meta["val"]]
    return [value for value in tree_leaves(values) if isinstance(value, Tensor)]


def _pin_values(
    labelling: Labelling, tensors: list[Tensor], known: Mapping[int, Labelled], path: str, op: str, reason: str
) -> None:
    for tensor in tensors:
        for layer in known[id(tensor)].layers if id(tensor) in known else ():
            labelling.space.pin(layer, path, op, reason)


def trial_pattern(size: int, seed: int) -> Tensor:
    """A reproducible pattern of live classes, half of them on average; bool of shape (size,)."""
    return torch.rand(size, generator=torch.Generator().manual_seed(seed)) < 0.5


def _pin_unwritable(analysis: Analysis) -> None:
    """Rewrite every traced forward for trial patterns; what has no form for them is pinned."""
    labelling = analysis.labelling
    settled = False
    while not settled:
        settled = True
        number = labelling.numbering()
        for seed in (0, 1):
            cut = analysis.cut(trial_pattern(int(number.max(initial=-1)) + 1, seed))
            for traced in analysis.traced:
                try:
                    traced.resize(cut)
                except Unwritable as error:
                    settled = False
                    tensors = _tensors_at(error.node)
                    _pin_values(labelling, tensors, traced.known, traced.path, str(error.node.target), error.cause)
            if not settled:
                break
