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
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from rewriters.analysis import Inputs
from rewriters.errors import AutogateError, TraceError
from rewriters.forwards import (
    NOT_TOLD_APART,
    RewrittenForward,
    TracedForward,
    call_name,
    out_of_place,
    set_forward,
    told_apart,
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


class Replaced(NamedTuple):
    """What became of a model's identity shortcuts.

    Attributes:
        shortcuts: the convolutions on those that were replaced.
        shared: modules whose shortcuts would gain from one but stay as they are, by path, and why.
    """

    shortcuts: tuple[Shortcut, ...]
    shared: Mapping[str, str]


def replace_shortcuts(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], undo_log: UndoLog,
    within: Collection[str] | None = None, ignore: Mapping[str, str] | None = None, embed: bool = True,
    others: Sequence[Inputs] = (),
) -> Replaced:  # fmt: skip
    """Replace identity shortcuts by 1x1 convolutions that start as the identity.

    A shortcut stays as it is if torch.fx can't trace its module's forward, if that runs several times, or if not all
    examples that run it have the same shortcuts in it.

    Args:
        model: changed in place.
        args: example inputs by position.
        kwargs: example inputs by name.
        undo_log: notes every change, so that it can be undone.
        within: paths of modules; all identity shortcuts in them are replaced. None replaces every shortcut that is the
            only coupling between its channels and those of the sum.
        ignore: names of parameters and buffers whose channels stay, with the reason.
        embed: whether channels that norms across channels include can be removed.
        others: more example inputs, for which the forward may take other ways.

    Raises:
        AutogateError: a path in `within` holds no identity shortcut, or one that has to stay as it is.
    """
    modes = set_modes(model, False)
    try:
        captures = [capture(model, *inputs) for inputs in ((args, kwargs), *others)]
    finally:
        set_modes(model, modes)
    labelling = Labelling(findings=Findings(live=embed))
    for captured in captures:
        labelling.run(captured)
    found = _by_module([add for captured in captures for add in residual_adds(captured, labelling)])
    found = found if within is None else _named(found, within)
    refused = {path: why for path in found if (why := _unlike(path, found[path], captures)) is not None}
    alike = [shortcut for path, adds in found.items() if path not in refused for shortcut in _shortcuts(adds)]
    coupled = coupling(captures, alike, ignore or {}, embed) if within is None else alike
    placed: list[Shortcut] = []
    for path in found:
        own = [adds for adds in coupled if adds[0].call.path == path]
        try:
            if path in refused:
                raise TraceError(refused[path], where=path)
            placed += _replace_in(model.get_submodule(path), own, captures, labelling, undo_log) if own else []
        except TraceError as error:
            if within is not None:
                raise AutogateError(f"{error.cause}.", where=path, remedy="Leave it out of `shortcuts`.") from error
            refused[path] = error.cause
    return Replaced(tuple(placed), refused)


def _named(found: dict[str, list[ResidualAdd]], within: Collection[str]) -> dict[str, list[ResidualAdd]]:
    for path in within:
        if not any(is_under(other, {path}) for other in found):
            raise AutogateError(
                "it holds no identity shortcut.",
                where=path,
                remedy=f"These do: {', '.join(found) or 'none'}.",
            )
    return {path: adds for path, adds in found.items() if is_under(path, set(within))}


def _by_module(adds: list[ResidualAdd]) -> dict[str, list[ResidualAdd]]:
    gathered: dict[str, list[ResidualAdd]] = {}
    for add in adds:
        gathered.setdefault(add.call.path, []).append(add)
    return gathered


def _unlike(path: str, adds: list[ResidualAdd], captures: Sequence[Capture]) -> str | None:
    """Why a module's shortcuts can't be replaced; None if each of its calls has the same ones."""
    times = [sum(call.path == path for call in captured.calls()) for captured in captures]
    if max(times) > 1:
        return "it is called several times"
    each = [[_kind(add) for add in own] for own in _by_call(adds)]
    if len(each) != sum(times) or any(own != each[0] for own in each):
        return "not all examples have the same shortcuts in it"
    return None


def _by_call(adds: list[ResidualAdd]) -> list[list[ResidualAdd]]:
    calls = {id(add.call): add.call for add in adds}.values()
    return [[add for add in adds if add.call is call] for call in calls]


def _kind(add: ResidualAdd) -> tuple[Any, ...]:
    """Equal for shortcuts that one convolution fits."""
    value: Tensor = add.shortcut.meta["val"]
    return value.ndim, add.dim, value.shape[add.dim], value.dtype, value.device


def _shortcuts(adds: list[ResidualAdd]) -> list[Sequence[ResidualAdd]]:
    """A module's shortcuts in their order, each as its add in every call."""
    return list(zip(*_by_call(adds), strict=True))


def _replace_in(
    module: nn.Module, shortcuts: list[Sequence[ResidualAdd]], captures: Sequence[Capture], labelling: Labelling,
    undo_log: UndoLog,
) -> list[Shortcut]:  # fmt: skip
    """Replace shortcuts in one module's forward. Raises `TraceError`; the module is as it was then."""
    path, first = shortcuts[0][0].call.path, [adds[0] for adds in shortcuts]
    names = _free_names(module, len(shortcuts))
    ways: dict[bool, dict[str, fx.Graph]] = {False: {}, True: {}}
    for adds in zip(*shortcuts, strict=True):
        captured = next(one for one in captures if one.graph is adds[0].node.graph)
        own = labelling.fork()
        for traced in trace_modes(module, adds[0].call, captured, own, own.by_tensor()):
            code = traced.code
            _insert_all(traced, adds, names)
            for mode in traced.modes:
                ways[mode].setdefault(code, traced.graph)
    graphs = {mode: tuple(each.values()) for mode, each in ways.items()}
    if not all(map(told_apart, graphs.values())):
        raise TraceError(NOT_TOLD_APART, where=path)
    before = module.__dict__.get("forward")
    for add, name in zip(first, names, strict=True):
        undo_log.set(module._modules, name, _identity(add, module.training))
    set_forward(module, RewrittenForward(module, graphs, path), undo_log)
    return [Shortcut(path, name, before) for name in names]


def _insert_all(traced: TracedForward, adds: Sequence[ResidualAdd], names: Sequence[str]) -> None:
    """Put convolutions on the shortcuts of these adds of a call into its trace."""
    recorded = [node for node in adds[0].call.nodes if node.target in ADDS]
    nodes = _adds_of(traced, len(recorded))
    for add, name in zip(adds, names, strict=True):
        _insert(traced.graph, nodes[recorded.index(add.node)], add.operand, name)


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
