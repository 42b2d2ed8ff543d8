"""What is left of a gated or slim model, layer by layer, and what is pinned."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace

import torch
from rich.markup import escape
from rich.table import Table
from torch import Tensor, nn

from autogate.files import DataConfig, data_config_of
from autogate.gating import GateBank, Progress
from autogate.inspection.printing import Printed, short
from autogate.slim import Layer, history_of, layers_of
from rewriters import AutogateError, ChannelMap, Pin, Side


@dataclass(frozen=True)
class Summary(Printed):
    """What is left of a prepared or a slim model. Print it for tables; a notebook shows them.

    Counts are for one sample. FLOPs are multiply-adds of convolutions and linear layers, as fvcore counts them.

    Attributes:
        flops, all_flops: FLOPs left, and of the model as it was given to `prepare`: to the first one, if it was slimmed
            several times.
        params, all_params: the same for parameters.
        reach: part of `all_flops` in layers that have a gate on their input or output side; None for a slim model.
        layers: all layers, in the order they run.
        shortcuts: the layers among them that `prepare` added for identity shortcuts. They count in `flops` and
            `params`, but not in `all_flops` and `all_params`.
        pins: channels that always stay, by the op that needs them; none for a slim model, which has no gates.
        progress: how far the gates are; None for a slim model.
        removed: modules of a slim model that were removed, because nothing was left in them.
        rewritten: modules of a slim model whose forward was rewritten, and why: for "sizes" that slimming changed, for
            "branches" that are gone, for a "shortcut" that selects channels, for "dead columns" that must not learn.
        shared: modules of a prepared model whose identity shortcuts stay though `shortcuts` asked for convolutions on
            them, and why.
        data_config: how images become a slim model's inputs, and the names of its classes, if it says so.
    """

    flops: float
    all_flops: float
    params: int
    all_params: int
    reach: float | None
    layers: tuple[Layer, ...]
    shortcuts: tuple[Layer, ...]
    pins: tuple[Pin, ...]
    progress: Progress | None
    removed: tuple[str, ...] = ()
    rewritten: Mapping[str, str] = field(default_factory=dict)
    shared: Mapping[str, str] = field(default_factory=dict)
    data_config: DataConfig | None = None

    def table(self) -> Table:
        """The layers, as a table of rich: channels and FLOPs before and after."""
        return _layers(self)

    def to_json(self) -> str:
        """All of it as JSON, for other programs."""
        return json.dumps(asdict(self), indent=1)

    def tables(self) -> tuple[Table, ...]:
        """What is printed."""
        return tuple(table(self) for table in (_totals, _layers, _shortcuts, _shared, _pins, _changes))


def summarise(model: nn.Module, bank: GateBank) -> Summary:
    """Summarise `model` under the current state of `bank`'s gates, including alphas set by hand."""
    channel_map, live = bank.channel_map, bank.live.cpu()
    layers = layers_of(channel_map, live)
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
        shared=bank.origin.shared,
    )


def summarise_slim(model: nn.Module) -> Summary:
    """Summarise a slim model, from the records of its slimmings.

    Raises:
        AutogateError: it was never slimmed, or its file is from before records told of layers.
    """
    history = history_of(model)
    if history is None or not history.slimmings[0].layers:
        raise AutogateError(
            "it has no record of its layers before they were slimmed.",
            where=type(model).__name__,
            remedy="Pass the model that autogate.finalize or autogate.load returned.",
        )
    first, last = history.slimmings[0], history.slimmings[-1]
    added = {path for slimming in history.slimmings for path in slimming.convolutions}
    kept = {layer.module: layer for layer in last.layers if layer.module not in added or _is_there(model, layer)}
    layers = tuple(_since(layer, kept.get(layer.module)) for layer in first.layers if layer.module not in added)
    shortcuts = tuple(replace(layer, all_macs=layer.macs) for path, layer in kept.items() if path in added)
    return Summary(
        flops=sum(layer.macs for layer in (*layers, *shortcuts)),
        all_flops=sum(layer.all_macs for layer in layers),
        params=sum(parameter.numel() for parameter in model.parameters()),
        all_params=first.params,
        reach=None,
        layers=(*layers, *shortcuts),
        shortcuts=shortcuts,
        pins=(),
        progress=None,
        removed=history.removed,
        rewritten=history.rewritten,
        data_config=data_config_of(model),
    )


def _is_there(model: nn.Module, layer: Layer) -> bool:
    return any(path == layer.module for path, _ in model.named_modules())


def _since(before: Layer, now: Layer | None) -> Layer:
    """A layer as it was before the first slimming and is after the last."""
    if now is None:
        return replace(before, inputs=0, outputs=0, macs=0.0)
    return replace(before, inputs=now.inputs, outputs=now.outputs, macs=now.macs)


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
    if now is not None:
        table.add_row("gates at zero", f"{now.dead} of {now.classes}")
        for name, share in now.shares.items():
            table.add_row("target", f"{now.targets[name]:.1%} of the {name}, {share:.1%} left")
        table.add_row("steps", f"{now.step} of {now.steps}")
    for name, text in () if summary.data_config is None else summary.data_config.rows():
        table.add_row(name, escape(text))
    if summary.reach is not None:
        table.add_row("within reach of gates", f"{summary.reach:.1%} of the FLOPs")
    return table


def _share(left: float, whole: float) -> str:
    return f"{short(left)} of {short(whole)} ({left / whole:.1%})" if whole else "0"


def _layers(summary: Summary) -> Table:
    table = Table("layer", "inputs", "outputs", "FLOPs", "left")
    for column in table.columns[1:]:
        column.justify = "right"
    for layer in summary.layers:
        if layer not in summary.shortcuts:
            table.add_row(
                escape(layer.module), *_widths(layer), short(layer.all_macs),
                f"{layer.macs / layer.all_macs:.0%}" if layer.all_macs else "-",
            )  # fmt: skip
    return table


def _widths(layer: Layer) -> tuple[str, str]:
    """Inputs and outputs, before and after if some are gone."""
    return tuple(  # type: ignore[return-value]
        str(whole) if left == whole else f"{whole} -> {left}"
        for left, whole in ((layer.inputs, layer.all_inputs), (layer.outputs, layer.all_outputs))
    )


def _changes(summary: Summary) -> Table:
    """Modules that were removed or rewritten."""
    table = Table("module", "what was done")
    for path in summary.removed:
        table.add_row(escape(path), "removed: nothing was left in it")
    for path, why in summary.rewritten.items():
        table.add_row(escape(path) or "(the model)", f"its forward was rewritten: {why}")
    return table


def _shortcuts(summary: Summary) -> Table:
    table = Table("1x1 convolution on a shortcut", "inputs", "outputs", "FLOPs", "share of all FLOPs")
    for column in table.columns[1:]:
        column.justify = "right"
    for layer in summary.shortcuts:
        table.add_row(
            escape(layer.module),
            *_widths(layer),
            short(layer.macs),
            f"{layer.macs / summary.all_flops:.1%}",
        )
    cost = sum(layer.macs for layer in summary.shortcuts)
    if summary.shortcuts:
        table.add_row("total", "", "", short(cost), f"{cost / summary.all_flops:.1%}")
    return table


def _shared(summary: Summary) -> Table:
    """Modules whose shortcuts stay though convolutions were asked for."""
    table = Table("identity shortcut that stays", "why")
    for path, why in summary.shared.items():
        table.add_row(escape(path) or "(the model)", escape(why))
    return table


def _pins(summary: Summary) -> Table:
    table = Table("pinned at", "op", "reason", "channels")
    for pin in summary.pins:
        more = f" and {len(pin.sides) - 1} more" if len(pin.sides) > 1 else ""
        cells = pin.place, pin.op, pin.reason, f"{pin.sides[0]}{more}"
        table.add_row(*map(escape, cells))
    return table
