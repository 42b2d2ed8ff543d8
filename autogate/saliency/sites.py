"""Where saliency modules go: to which layers, and where each one's norm is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from autogate.saliency.kinds import Kind, calls_in, can_be, classes_of, hidden_units, kinds_of
from rewriters import ALWAYS, Analysis, ChannelMap, Kernel
from rewriters.recording import Capture, ModuleCall


@dataclass(frozen=True)
class Scaling:
    """The place where a layer's output is scaled.

    Attributes:
        path: of the module: the norm behind the layer, what is inside of that behind its statistics, or the layer
            itself.
        at: whether its output is scaled or its input.
        across: the norm takes statistics across channels.
    """

    path: str
    at: Literal["output", "input"] = "output"
    across: bool = False


@dataclass(frozen=True)
class Layer:
    """A convolution or linear layer of a model.

    Attributes:
        kernel: its kernel.
        kind: see `CountedLayer`.
        scaling: where its output is scaled, for one that chooses or follows.
        why: as in `Decided`.
        hidden: rows of W1 of its saliency module; 0 if it has none.
    """

    kernel: Kernel
    kind: Kind
    scaling: Scaling | None = None
    why: str = ""
    hidden: int = 0


class Known(NamedTuple):
    """What was decided of a layer before: its kind, and the hidden units of its saliency module."""

    kind: Kind
    hidden: int


def layers_in(
    model: nn.Module, analysis: Analysis, reduction: float, known: Mapping[str, Known] | None = None
) -> list[Layer]:
    """The model's layers in the order they run, and which of them get a saliency module.

    Args:
        model: the model.
        analysis: of its channels.
        reduction: r of equation 6.
        known: what was decided before, by path: the layers' sizes don't matter then.
    """
    calls, modules = calls_in(analysis), dict(model.named_modules())
    decided, found = kinds_of(model, analysis, reduction), []
    for kernel in analysis.channel_map.kernels:
        if kernel.module not in decided or kernel.weight != f"{kernel.module}.weight".lstrip("."):
            continue
        kind, why = decided[kernel.module]
        hidden = hidden_units(analysis.channel_map.sizes[kernel.output_side], reduction) if kind == "chosen" else 0
        if known is not None:
            before, module = known.get(kernel.module, Known("whole", 0)), modules[kernel.module]
            kind, hidden = before if can_be(module, before.kind) and kernel.module in calls else Known("whole", 0)
        found.append(Layer(kernel, kind, None, why, hidden))
    return [
        replace(layer, scaling=_scaling(layer.kernel, calls, analysis, modules))
        if layer.kind in ("chosen", "follows") else layer
        for layer in _standing(found, analysis.channel_map)
    ]  # fmt: skip


def _standing(layers: Sequence[Layer], channel_map: ChannelMap) -> list[Layer]:
    """The layers; those that would follow or read channels which no layer chooses, or all of them, run whole."""
    chosen: set[int] = set()
    whole: set[int] = set()
    for follows in (True, False):  # whether a depthwise convolution runs whole decides what others read
        standing = []
        for layer in layers:
            outputs, inputs = (set(classes_of(channel_map, side).tolist()) - {ALWAYS}
                               for side in (layer.kernel.output_side, layer.kernel.input_side))  # fmt: skip
            if layer.kind == ("follows" if follows else "reads") and (
                (outputs if follows else inputs).isdisjoint(chosen - whole)
            ):
                layer = replace(layer, kind="whole")
            if layer.kind == "chosen":
                chosen |= outputs
            elif layer.kind != "follows":
                whole |= outputs
            standing.append(layer)
        layers = standing
    return list(layers)


def _scaling(
    kernel: Kernel, calls: Mapping[str, Sequence[ModuleCall]], analysis: Analysis, modules: Mapping[str, nn.Module]
) -> Scaling:  # fmt: skip
    path, captured, channel_map = kernel.module, analysis.in_eval_mode[0], analysis.channel_map
    norms = [_norm_behind(call, captured, modules, calls) for call in calls[path]]
    norm = norms[0]
    if norm is None or any(other is None or other.path != norm.path for other in norms):
        return Scaling(path)
    if len(calls[norm.path]) != len(norms):  # it norms something else too
        return Scaling(path)
    across = any(f"{taken.path}.".startswith(f"{norm.path}.") for taken in channel_map.statistics)
    if not across and not isinstance(modules[norm.path], _NormBase):  # a group norm couples the channels of a group
        across = len(classes_of(channel_map, kernel.output_side).unique()) < channel_map.sizes[kernel.output_side]
    inside = norm.children[0] if norm.children else None
    if inside is not None and _takes_it(inside, norm) and len(calls[inside.path]) == len(norms):
        return Scaling(inside.path, "input", across)
    return Scaling(norm.path, across=across)


def _norm_behind(
    call: ModuleCall, captured: Capture, modules: Mapping[str, nn.Module], calls: Mapping[str, Sequence[ModuleCall]]
) -> ModuleCall | None:
    """The call of a norm that takes what a layer returns, if nothing else does."""
    node = captured.nodes.get(id(call.output))
    if node is None or not node.users:
        return None
    for others in calls.values():
        for other in others:
            takes = other.args and other.args[0] is call.output
            if takes and _is_norm(modules[other.path]):
                within = {id(one) for one in other.walk()}
                return other if all(id(user.meta.get("call")) in within for user in node.users) else None
    return None


def _is_norm(module: nn.Module) -> bool:
    """Whether a module is a norm, by its name; a block of layers without norms may be called so too."""
    return "norm" in type(module).__name__.lower() and all(weight.ndim < 2 for weight in module.parameters())


def _takes_it(inside: ModuleCall, norm: ModuleCall) -> bool:
    """Whether a module inside of a norm is called with a feature map of the norm's shape: what it has normed."""
    given = inside.args[0] if inside.args else None
    return isinstance(given, Tensor) and isinstance(norm.output, Tensor) and given.shape == norm.output.shape
