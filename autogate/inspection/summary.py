"""What is left of a model under its gates, layer by layer, and what is pinned."""

from __future__ import annotations

import io
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from autogate.gating import GateBank, Progress
from rewriters import ChannelMap, Kernel, Pin, Side


@dataclass(frozen=True)
class Layer:
    """A convolution or linear layer: its channels left and in all, on both sides, and its multiply-adds."""

    module: str
    inputs: int
    all_inputs: int
    outputs: int
    all_outputs: int
    macs: float
    all_macs: float


@dataclass(frozen=True)
class Summary:
    """The state of a prepared model. Print it for a table.

    Counts are for one sample. FLOPs are multiply-adds of convolutions and linear layers, as fvcore counts them.

    Attributes:
        flops, all_flops: FLOPs left under the gates, and of the model as it was given to `prepare`.
        params, all_params: the same for parameters.
        reach: part of `all_flops` in layers that have a gate on their input or output side.
        layers: all layers, in the order they run.
        shortcuts: the layers among them that `prepare` added for identity shortcuts. They count in `flops` and
            `params`, but not in `all_flops` and `all_params`.
        pins: channels that always stay, by the op that needs them.
        progress: how far the gates are.
    """

    flops: float
    all_flops: float
    params: int
    all_params: int
    reach: float
    layers: tuple[Layer, ...]
    shortcuts: tuple[Layer, ...]
    pins: tuple[Pin, ...]
    progress: Progress

    def __str__(self) -> str:
        console = Console(width=110, record=True, file=io.StringIO())
        console.print(_totals(self))
        console.print(_layers(self))
        if self.shortcuts:
            console.print(_shortcuts(self))
        if self.pins:
            console.print(_pins(self))
        return console.export_text().rstrip()


def summarise(model: nn.Module, bank: GateBank) -> Summary:
    """Summarise `model` under the current state of `bank`'s gates, including alphas set by hand."""
    channel_map, live = bank.channel_map, bank.live.cpu()
    layers = tuple(_layer(channel_map, live, kernel) for kernel in channel_map.kernels)
    added = {kernel.module for kernel in channel_map.kernels if kernel.weight in bank.added}
    shortcuts = tuple(layer for layer in layers if layer.module in added)
    total = sum(layer.all_macs for layer in layers if layer.module not in added)
    reached = sum(
        layer.all_macs for layer, kernel in zip(layers, channel_map.kernels, strict=True)
        if channel_map.reached(kernel) and layer.module not in added
    )  # fmt: skip
    return Summary(
        flops=sum(layer.macs for layer in layers),
        all_flops=total,
        params=sum(_left(channel_map, live, name, p.shape) for name, p in model.named_parameters()),
        all_params=sum(p.numel() for name, p in model.named_parameters() if name not in bank.added),
        reach=reached / total if total else 0.0,
        layers=layers,
        shortcuts=shortcuts,
        pins=channel_map.pins,
        progress=bank.progress(),
    )


def _layer(channel_map: ChannelMap, live: Tensor, kernel: Kernel) -> Layer:
    everything = torch.ones_like(live)
    inputs, outputs = (
        (channel_map.width(side, live), channel_map.width(side, everything))
        for side in (kernel.input_side, kernel.output_side)
    )
    macs = channel_map.macs(kernel, live), channel_map.macs(kernel, everything)
    return Layer(kernel.module or kernel.weight, *inputs, *outputs, *macs)


def _left(channel_map: ChannelMap, live: Tensor, name: str, shape: torch.Size) -> int:
    left = 1
    for dim, size in enumerate(shape):
        side = Side(name, dim)
        left *= channel_map.width(side, live) if side in channel_map.classes else size
    return left


def _totals(summary: Summary) -> Table:
    now = summary.progress
    table = Table(title="autogate", title_justify="left", show_header=False)
    table.add_row("FLOPs (multiply-adds)", _share(summary.flops, summary.all_flops))
    table.add_row("parameters", _share(summary.params, summary.all_params))
    table.add_row("gates at zero", f"{now.dead} of {now.classes}")
    for name, share in now.shares.items():
        table.add_row("target", f"{now.targets[name]:.1%} of the {name}, {share:.1%} left")
    table.add_row("steps", f"{now.step} of {now.steps}")
    table.add_row("within reach of gates", f"{summary.reach:.1%} of the FLOPs")
    return table


def _share(left: float, whole: float) -> str:
    return f"{short(left)} of {short(whole)} ({left / whole:.1%})" if whole else "0"


def short(number: float) -> str:
    """A number with a unit prefix: 4.09 G."""
    for unit, scale in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= scale:
            return f"{number / scale:.2f} {unit}"
    return f"{number:.0f}"


def _layers(summary: Summary) -> Table:
    table = Table("layer", "inputs", "outputs", "FLOPs left")
    for column in table.columns[1:]:
        column.justify = "right"
    for layer in summary.layers:
        if layer in summary.shortcuts:
            continue
        table.add_row(
            layer.module,
            f"{layer.inputs} / {layer.all_inputs}",
            f"{layer.outputs} / {layer.all_outputs}",
            f"{layer.macs / layer.all_macs:.0%}" if layer.all_macs else "-",
        )
    return table


def _shortcuts(summary: Summary) -> Table:
    table = Table("1x1 convolution on a shortcut", "inputs", "outputs", "FLOPs", "share of all FLOPs")
    for column in table.columns[1:]:
        column.justify = "right"
    for layer in summary.shortcuts:
        table.add_row(
            layer.module,
            f"{layer.inputs} / {layer.all_inputs}",
            f"{layer.outputs} / {layer.all_outputs}",
            short(layer.macs),
            f"{layer.macs / summary.all_flops:.1%}",
        )
    cost = sum(layer.macs for layer in summary.shortcuts)
    table.add_row("total", "", "", short(cost), f"{cost / summary.all_flops:.1%}")
    return table


def _pins(summary: Summary) -> Table:
    table = Table("pinned at", "op", "reason", "channels")
    for pin in summary.pins:
        more = f" and {len(pin.sides) - 1} more" if len(pin.sides) > 1 else ""
        table.add_row(pin.module or "(outputs)", pin.op, pin.reason, f"{pin.sides[0]}{more}")
    return table
