"""Which layers of a model choose their channels for each image, and why the others don't."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from rewriters import ALWAYS, Analysis, ChannelMap, Kernel, Side, samples_in
from rewriters.recording import ModuleCall, tensors_of

Kind = Literal["chosen", "follows", "reads", "whole"]
"""What is computed of a layer for an image: the channels that its saliency module chooses; those that a layer before it
has chosen (a depthwise convolution, the second linear layer of a gated MLP); all of its outputs from the inputs that
aren't zero; everything."""

LEAST_SAVED = 10
"""A layer costs at least so many times what its saliency module does."""

NEEDED = "all of its outputs are needed (autogate.prepare would pin them too)"


class Decided(NamedTuple):
    """What was decided of a layer: its kind, and if others like it choose, why it doesn't.

    Kinds "follows" and "reads" only hold where some layer before it chooses the channels.
    """

    kind: Kind
    why: str = ""


def kinds_of(model: nn.Module, analysis: Analysis, reduction: float) -> dict[str, Decided]:
    """What each convolution and linear layer of a model can be, by its path, in the order they run.

    Args:
        model: the model.
        analysis: of its channels.
        reduction: r of equation 6.
    """
    channel_map, modules = analysis.channel_map, dict(model.named_modules())
    calls, folded, hidden = calls_in(analysis), _folded(analysis), _hidden(channel_map)
    found: dict[str, Decided] = {}
    units: set[int] = set()  # of linear layers that choose
    for kernel in channel_map.kernels:
        module, runs = modules.get(kernel.module), len(calls.get(kernel.module, ()))
        if not isinstance(module, (_ConvNd, nn.Linear)) or kernel.weight != f"{kernel.module}.weight".lstrip("."):
            continue
        if kernel.repeats or not runs:
            decided = Decided("whole")
        elif isinstance(module, nn.Linear):
            decided = _linear(kernel, channel_map, hidden, folded)
        else:
            decided = _convolution(module, kernel, channel_map)
        outputs = classes_of(channel_map, kernel.output_side).tolist()
        if decided.kind == "chosen" and units.issuperset(outputs):
            decided = Decided("follows")
        elif decided.kind == "chosen" and _costs_too_much(kernel, channel_map, runs, reduction):
            decided = Decided("reads", "a saliency module would cost more than a tenth of it")
        elif decided.kind == "chosen" and isinstance(module, nn.Linear):
            units.update(outputs)
        found[kernel.module] = decided
    return found


def can_be(module: nn.Module, kind: Kind) -> bool:
    """Whether a layer can be of a kind that was recorded."""
    if isinstance(module, nn.Linear):
        return True
    if not isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return kind == "whole"
    depthwise, regular = module.groups == module.in_channels == module.out_channels, module.groups == 1
    return {"whole": True, "chosen": regular, "reads": regular, "follows": depthwise}[kind]


def calls_in(analysis: Analysis) -> dict[str, list[ModuleCall]]:
    """The calls of each module on the first example, by path."""
    calls: dict[str, list[ModuleCall]] = {}
    for call in analysis.in_eval_mode[0].calls():
        calls.setdefault(call.path, []).append(call)
    return calls


def hidden_units(outputs: int, reduction: float) -> int:
    """C / r of equation 6."""
    return max(1, round(outputs / reduction))


def classes_of(channel_map: ChannelMap, side: Side) -> Tensor:
    """The class of each index of a side of a kernel, int64; `ALWAYS` where it stays."""
    known = channel_map.classes.get(side)
    return known.cpu() if known is not None else Tensor([ALWAYS]).long().expand(channel_map.sizes[side])


def _convolution(module: nn.Module, kernel: Kernel, channel_map: ChannelMap) -> Decided:
    """A regular convolution chooses, a depthwise one may follow."""
    if not isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return Decided("whole")
    if module.groups == module.in_channels == module.out_channels > 1:
        return Decided("follows" if Side(kernel.weight, 0) in channel_map.classes else "whole")
    if module.groups > 1:
        return Decided("whole", "its channels are in groups")
    return Decided("chosen") if kernel.output_side in channel_map.classes else Decided("reads", NEEDED)


def _linear(kernel: Kernel, channel_map: ChannelMap, hidden: Tensor, folded: Mapping[str, bool]) -> Decided:
    """A linear layer chooses if its outputs are hidden units, of an MLP for instance."""
    if folded[kernel.module]:
        return Decided("whole", "the first dimension of its input isn't that of the images")
    if kernel.output_side not in channel_map.classes:
        return Decided("reads", NEEDED)
    classes = classes_of(channel_map, kernel.output_side)
    if not channel_map.heads.isdisjoint(classes.tolist()):
        return Decided("reads", "its outputs are heads of attention")
    if not hidden[classes].all():
        return Decided("reads", "its outputs are added to those of other layers")
    return Decided("chosen")


def _hidden(channel_map: ChannelMap) -> Tensor:
    """The classes that no layer reads before all layers that make them have run, bool, shape (classes + 1,).

    Those of a residual stream are read and then added to.
    """
    kernels = channel_map.kernels
    made = torch.full((channel_map.size + 1,), -1)
    read = torch.full((channel_map.size + 1,), len(kernels))
    for number, kernel in enumerate(kernels):
        made[classes_of(channel_map, kernel.output_side)] = number
        inputs = classes_of(channel_map, kernel.input_side)
        read[inputs] = read[inputs].clamp(max=number)
    found = made < read
    found[ALWAYS] = False
    return found


def _folded(analysis: Analysis) -> dict[str, bool]:
    """Whether a module is called on a tensor whose first dimension isn't, for certain, that of the images; by path."""
    found: dict[str, bool] = {}
    for captured in analysis.in_eval_mode:
        images = samples_in(captured.root.args, captured.root.kwargs)
        for call in captured.calls():
            folded = any(_is_folded(tensor, images) for tensor in tensors_of((call.args, call.kwargs))[:1])
            found[call.path] = found.get(call.path, False) or folded
    return found


def _is_folded(x: Tensor, images: int) -> bool:
    return x.ndim < 2 or x.shape[0] != images or (x.ndim > 2 and x.shape[1] == images)


def _costs_too_much(kernel: Kernel, channel_map: ChannelMap, runs: int, reduction: float) -> bool:
    inputs, outputs = (channel_map.sizes[side] for side in (kernel.input_side, kernel.output_side))
    own = (inputs + outputs) * hidden_units(outputs, reduction) * runs
    return kernel.macs * inputs * outputs < LEAST_SAVED * own
