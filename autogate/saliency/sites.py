"""Where saliency modules go: which convolutions, and where each one's norm is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from rewriters import ALWAYS, Analysis, ChannelMap, Kernel, Side
from rewriters.recording import Capture, ModuleCall

Kind = Literal["chosen", "follows", "whole"]
"""A layer that has a saliency module; a depthwise one, which computes the channels that aren't zero; any other."""

LEAST_SAVED = 10
"""A convolution costs at least so many times what its saliency module does."""


@dataclass(frozen=True)
class Scaling:
    """The place where a convolution's output is scaled.

    Attributes:
        path: of the module: the norm behind the convolution, what is inside of that behind its statistics, or the
            convolution itself.
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
        scaling: where its output is scaled, for one that isn't whole.
        why: for a regular convolution that is whole, the reason.
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
    channel_map, captured = analysis.channel_map, analysis.in_eval_mode[0]
    calls: dict[str, list[ModuleCall]] = {}
    for call in captured.calls():
        calls.setdefault(call.path, []).append(call)
    modules = dict(model.named_modules())
    found: list[Layer] = []
    made: set[int] = set()
    whole: set[int] = set()
    for kernel in channel_map.kernels:
        module = modules.get(kernel.module)
        if not isinstance(module, (_ConvNd, nn.Linear)) or kernel.weight != f"{kernel.module}.weight".lstrip("."):
            continue
        kind, why = _kind(module, kernel, channel_map, calls.get(kernel.module, []), reduction)
        hidden = hidden_units(channel_map.sizes[kernel.output_side], reduction) if kind == "chosen" else 0
        if known is not None:
            before = known.get(kernel.module, Known("whole", 0))
            kind, hidden = before if _can_be(module, before.kind) and kernel.module in calls else Known("whole", 0)
        outputs = set(classes_of(channel_map, kernel.output_side).tolist()) - {ALWAYS}
        if kind == "follows" and outputs.isdisjoint(made - whole):
            kind = "whole"
        elif kind == "chosen":
            made |= outputs
        elif kind == "whole":
            whole |= outputs
        scaling = None if kind == "whole" else _scaling(kernel.module, calls, captured, modules, channel_map)
        found.append(Layer(kernel, kind, scaling, why, hidden))
    return found


def hidden_units(outputs: int, reduction: float) -> int:
    """C / r of equation 6."""
    return max(1, round(outputs / reduction))


def classes_of(channel_map: ChannelMap, side: Side) -> Tensor:
    """The class of each index of a side of a kernel, int64; `ALWAYS` where it stays."""
    known = channel_map.classes.get(side)
    return known.cpu() if known is not None else Tensor([ALWAYS]).long().expand(channel_map.sizes[side])


def _kind(
    module: nn.Module, kernel: Kernel, channel_map: ChannelMap, calls: Sequence[ModuleCall], reduction: float
) -> tuple[Kind, str]:
    if not isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) or kernel.repeats or not calls:
        return "whole", ""
    has_channels = kernel.output_side in channel_map.classes
    if module.groups == module.in_channels == module.out_channels > 1:
        return ("follows" if Side(kernel.weight, 0) in channel_map.classes else "whole"), ""
    if module.groups > 1:
        return "whole", "its channels are in groups"
    if not has_channels:
        return "whole", "all of its outputs are needed (autogate.prepare would pin them too)"
    inputs, outputs = module.in_channels, module.out_channels
    own = (inputs + outputs) * hidden_units(outputs, reduction) * len(calls)
    if kernel.macs * inputs * outputs < LEAST_SAVED * own:
        return "whole", "a saliency module would cost more than a tenth of it"
    return "chosen", ""


def _can_be(module: nn.Module, kind: Kind) -> bool:
    """Whether a layer can be of a kind that was recorded."""
    if not isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return kind == "whole"
    depthwise = module.groups == module.in_channels == module.out_channels
    return {"whole": True, "chosen": module.groups == 1, "follows": depthwise}[kind]


def _scaling(
    path: str, calls: Mapping[str, Sequence[ModuleCall]], captured: Capture, modules: Mapping[str, nn.Module],
    channel_map: ChannelMap,
) -> Scaling:  # fmt: skip
    norms = [_norm_behind(call, captured, modules, calls) for call in calls[path]]
    norm = norms[0]
    if norm is None or any(other is None or other.path != norm.path for other in norms):
        return Scaling(path)
    if len(calls[norm.path]) != len(norms):  # it norms something else too
        return Scaling(path)
    across = any(f"{taken.path}.".startswith(f"{norm.path}.") for taken in channel_map.statistics)
    inside = norm.children[0] if norm.children else None
    if inside is not None and _takes_it(inside, norm) and len(calls[inside.path]) == len(norms):
        return Scaling(inside.path, "input", across)
    return Scaling(norm.path, across=across)


def _norm_behind(
    call: ModuleCall, captured: Capture, modules: Mapping[str, nn.Module], calls: Mapping[str, Sequence[ModuleCall]]
) -> ModuleCall | None:
    """The call of a norm that takes what a convolution returns, if nothing else does."""
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
