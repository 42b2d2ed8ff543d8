"""Put a 1x1 convolution on an identity shortcut.

A residual add over an identity shortcut couples its operands, so a whole stage keeps or loses a channel together. A 1x1
convolution on the shortcut uncouples them, and each block has a width of its own. It starts as the identity: no output
changes.

The module whose forward holds the add is traced, and the call of the convolution is put into the graph, in both modes.
From then on it is a layer like any other.

Yang et al., "Non-uniform DNN Structured Subnets Sampling for Dynamic Inference", section IV.A.2 and figure 5.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from rewriters.errors import AutogateError, TraceError
from rewriters.forwards import (
    RewrittenForward,
    TracedForward,
    call_name,
    graphs_by_mode,
    out_of_place,
    set_forward,
    trace_modes,
)
from rewriters.labelling import Labelling
from rewriters.labelling.rules import Findings
from rewriters.recording import Capture, capture, set_modes
from rewriters.shortcuts.residual_adds import ADDS, ResidualAdd, coupling, residual_adds
from rewriters.slimming import is_under
from rewriters.undo_log import UndoLog

_CONVOLUTIONS = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}


@dataclass(frozen=True, eq=False)
class Shortcut:
    """A 1x1 convolution (a linear layer, if channels come last) on what was an identity shortcut.

    Attributes:
        module: path of the module whose forward holds the add.
        name: the convolution's name in that module.
        before: the module's rewritten forward from an earlier slimming, or None if it ran its class's own.
    """

    module: str
    name: str
    before: RewrittenForward | None

    @property
    def path(self) -> str:
        """The convolution's path."""
        return f"{self.module}.{self.name}".lstrip(".")

    @property
    def weight(self) -> str:
        """The name of its kernel."""
        return f"{self.path}.weight"


def replace_shortcuts(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], undo_log: UndoLog,
    within: Collection[str] | None = None, ignore: Mapping[str, str] | None = None, embed: bool = True,
) -> tuple[Shortcut, ...]:  # fmt: skip
    """Replace identity shortcuts by 1x1 convolutions that start as the identity.

    A shortcut stays as it is if torch.fx can't trace its module's forward, or if that runs several times.

    Args:
        model: changed in place.
        args: example inputs by position.
        kwargs: example inputs by name.
        undo_log: notes every change, so that it can be undone.
        within: paths of modules; all identity shortcuts in them are replaced. None replaces every shortcut that is the
            only coupling between its channels and those of the sum.
        ignore: names of parameters and buffers whose channels stay, with the reason.
        embed: whether channels that norms across channels include can be removed.

    Raises:
        AutogateError: a path in `within` holds no identity shortcut, or one that has to stay as it is.
    """
    modes = set_modes(model, False)
    try:
        captured = capture(model, args, kwargs)
    finally:
        set_modes(model, modes)
    labelling = Labelling(findings=Findings(live=embed))
    labelling.run(captured)
    adds = residual_adds(captured, labelling)
    adds = coupling(captured, adds, ignore or {}, embed) if within is None else _named(adds, within)
    times = Counter(call.path for call in captured.calls())
    placed: list[Shortcut] = []
    for path, own in _by_module(adds).items():
        try:
            if times[path] > 1:
                raise TraceError("it is called several times", where=path)
            placed += _replace_in(model.get_submodule(path), own, captured, labelling, undo_log)
        except TraceError:
            if within is not None:
                raise
    return tuple(placed)


def _named(adds: list[ResidualAdd], within: Collection[str]) -> list[ResidualAdd]:
    for path in within:
        if not any(is_under(add.call.path, {path}) for add in adds):
            raise AutogateError(
                "it holds no identity shortcut.",
                where=path,
                remedy=f"These do: {', '.join(_by_module(adds)) or 'none'}.",
            )
    return [add for add in adds if is_under(add.call.path, set(within))]


def _by_module(adds: list[ResidualAdd]) -> dict[str, list[ResidualAdd]]:
    gathered: dict[str, list[ResidualAdd]] = {}
    for add in adds:
        gathered.setdefault(add.call.path, []).append(add)
    return gathered


def _replace_in(
    module: nn.Module, adds: list[ResidualAdd], captured: Capture, labelling: Labelling, undo_log: UndoLog
) -> list[Shortcut]:
    """Replace the shortcuts in one module's forward. Raises `TraceError`; the module is as it was then."""
    call = adds[0].call
    own = labelling.fork()
    traced = trace_modes(module, call, captured, own, own.by_tensor())
    recorded = [node for node in call.nodes if node.target in ADDS]
    sites = [_adds_of(one, len(recorded)) for one in traced]
    names = _free_names(module, len(adds))
    for one, nodes in zip(traced, sites, strict=True):
        for add, name in zip(adds, names, strict=True):
            _insert(one.graph, nodes[recorded.index(add.node)], add.operand, name)
    before = module.__dict__.get("forward")
    for add, name in zip(adds, names, strict=True):
        undo_log.set(module._modules, name, _identity(add, module.training))
    graphs = graphs_by_mode(traced, lambda one: one.graph)
    set_forward(module, RewrittenForward(module, graphs, call.path), undo_log)
    return [Shortcut(call.path, name, before) for name in names]


def _adds_of(traced: TracedForward, count: int) -> list[fx.Node]:
    """The adds in a traced forward, one node for each recorded add."""
    found = [node for node in traced.graph.nodes if node.meta.get("ops") and node.meta["ops"][0] in ADDS]
    hidden = sum(op in ADDS for node in traced.graph.nodes for op in node.meta.get("ops") or ()) - len(found)
    if len(found) != count or hidden:
        raise TraceError("traced, its adds are not those that were recorded", where=traced.path)
    return found


def _insert(graph: fx.Graph, add: fx.Node, operand: int, name: str) -> None:
    shortcut = add.args[operand] if len(add.args) > operand else None
    if not isinstance(shortcut, fx.Node):
        raise TraceError(f"{call_name(add)} does not have its operands as positional arguments")
    with graph.inserting_before(add):
        convolved = graph.call_module(name, (shortcut,))
    later = list(add.users) if operand == 0 else []
    add.update_arg(operand, convolved)
    plain = out_of_place(add.target)
    if operand == 0 and plain != add.target:
        # The add wrote into the shortcut's tensor. Those who read that later now have to read the sum.
        add.target = plain
        at = list(graph.nodes).index(add)
        for user in list(graph.nodes)[at + 1 :]:
            if shortcut in user.all_input_nodes and user not in later:
                user.replace_input_with(shortcut, add)


def _free_names(module: nn.Module, count: int) -> list[str]:
    names = (f"shortcut_conv_{number}" if number else "shortcut_conv" for number in itertools.count())
    return list(itertools.islice((name for name in names if not hasattr(module, name)), count))


def _identity(add: ResidualAdd, training: bool) -> nn.Module:
    """A 1x1 convolution, or a linear layer if channels come last, that is the identity."""
    value: Tensor = add.shortcut.meta["val"]
    channels = value.shape[add.dim]
    like: dict[str, Any] = {"device": value.device, "dtype": value.dtype}
    if add.dim == 1 and value.ndim in _CONVOLUTIONS:
        layer: nn.Module = _CONVOLUTIONS[value.ndim](channels, channels, 1, bias=False, **like)
    else:
        layer = nn.Linear(channels, channels, bias=False, **like)
    with torch.no_grad():
        weight = layer.get_parameter("weight")
        weight.copy_(torch.eye(channels, **like).view_as(weight))
    return layer.train(training)
