"""What could be removed from a model, before anything is trained: groups, pins, FLOPs by stage.

`autogate inspect` prints it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from autogate.budget import Flops, Params, Shares, Target, Targets
from autogate.inputs import as_call
from autogate.lock import locked
from autogate.naming import Ignored, named_by
from autogate.saliency import check_not_adaptive
from autogate.slim import AnalysisOptions, add_shortcut_convolutions, analyse_channels
from autogate.steering import Narrowing, fewest_live, groups_of, part_alike
from rewriters import ChannelMap, Pin, UndoLog


@dataclass(frozen=True)
class ChannelGroup:
    """Channels that are on the same sides.

    Attributes:
        width: number of channels, or of heads.
        made_by, read_by: the kernels that have them on their output and input side.
        price: FLOPs saved by removing one of them, with all others staying.
        heads: whether they are heads of attention, each with its channels.
    """

    width: int
    made_by: tuple[str, ...]
    read_by: tuple[str, ...]
    price: float
    heads: bool = False


@dataclass(frozen=True)
class Stage:
    """FLOPs of a part of the model: in the dense model, and at the budget."""

    name: str
    all_flops: float
    flops: float


@dataclass(frozen=True)
class Inspection:
    """What `inspect_model` found.

    Attributes:
        channel_map: the model's channels.
        groups: the channels that can be removed.
        pins: why the other channels stay.
        stages: the FLOPs by part of the model, in the order the layers run.
        keep: the part of its channels that every group keeps to meet the budget; None if that can't be met with every
            group alive. `flops` and `params` are then those of the fewest channels.
        flops, all_flops: multiply-adds for one sample, at the budget and in the dense model.
        params, all_params: the same for parameters.
        least: the smallest share of the FLOPs that a budget can ask for: that of the fewest channels that connect
            inputs to outputs.
    """

    channel_map: ChannelMap
    groups: tuple[ChannelGroup, ...]
    pins: tuple[Pin, ...]
    stages: tuple[Stage, ...]
    keep: float | None
    flops: float
    all_flops: float
    params: float
    all_params: float
    least: float


@locked
def inspect_model(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    flops: float = 0.5,
    ignore: Ignored = (),
    shortcuts: str | tuple[str, ...] = "shared",
    by_layer: bool = False,
) -> Inspection:
    """Find out what can be removed from a model and what a budget would leave of it. The model is left as it was.

    Args:
        model, example_inputs, flops, ignore, shortcuts: as for `prepare`.
        by_layer: make a stage of each layer.

    Raises:
        AutogateError: as for `prepare`; but a budget out of reach is met as closely as possible. Also if the model
            chooses its channels for each image.
    """
    check_not_adaptive(model)
    Shares(flops=flops)  # raises if the share is outside of (0, 1]
    ignored = dict.fromkeys(named_by(model, ignore), "the caller asked for it")
    options = AnalysisOptions(as_call(example_inputs, model), ignored, shortcuts)
    undo_log = UndoLog()
    try:
        added = {shortcut.weight for shortcut in add_shortcut_convolutions(model, options, undo_log).shortcuts}
        channel_map = analyse_channels(model, options).channel_map
        cost, params = Flops(channel_map, model, added), Params(channel_map, model)
    finally:
        undo_log.undo()
    groups = groups_of(channel_map, round_to=1)
    narrowing, fewest = Narrowing(groups), fewest_live(groups, channel_map)
    keep = part_alike(narrowing, Targets([Target(cost, flops)]))
    live = fewest if keep is None else narrowing.live(keep)
    everything = torch.ones_like(live)
    return Inspection(
        channel_map=channel_map,
        groups=_groups(channel_map, cost.drop(everything)),
        pins=channel_map.pins,
        stages=_stages(channel_map, live, by_layer),
        keep=keep,
        flops=float(cost.value(live)),
        all_flops=cost.whole,
        params=float(params.value(live)),
        all_params=float(params.value(everything)),
        least=float(cost.value(fewest)) / cost.whole if cost.whole else 0.0,
    )


def _groups(channel_map: ChannelMap, drop: Tensor) -> tuple[ChannelGroup, ...]:
    found = []
    for group in channel_map.groups():
        sides = set(group.sides)
        kernels = channel_map.kernels
        made_by = tuple(kernel.module for kernel in kernels if kernel.output_side in sides)
        read_by = tuple(kernel.module for kernel in kernels if kernel.input_side in sides and kernel.mixes)
        price = float(drop[list(group.classes)].mean())
        found.append(ChannelGroup(len(group.classes), made_by, read_by, price, group.heads))
    return tuple(found)


def _stages(channel_map: ChannelMap, live: Tensor, by_layer: bool) -> tuple[Stage, ...]:
    whole: dict[str, float] = {}
    left: dict[str, float] = {}
    everything = torch.ones_like(live)
    for kernel in channel_map.kernels:
        name = kernel.module if by_layer else stage_of(kernel.module)
        for total, alive in ((whole, everything), (left, live)):
            total[name] = total.get(name, 0.0) + channel_map.macs(kernel, alive)
    return tuple(Stage(name, total, left[name]) for name, total in whole.items())


def stage_of(module: str) -> str:
    """The part of the model that a module belongs to: its outermost parent, with an index if that is a list of blocks.

    >>> stage_of("layer1.0.conv1"), stage_of("blocks.3.0.conv_pw"), stage_of("fc")
    ('layer1', 'blocks.3', 'fc')
    """
    first, *rest = module.split(".")
    return f"{first}.{rest[0]}" if rest and rest[0].isdecimal() and not first[-1:].isdecimal() else first
