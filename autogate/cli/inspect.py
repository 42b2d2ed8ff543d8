"""`autogate inspect`: what could be removed from a model, before anything is trained."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table
from torch import nn

from autogate.cli.common import Debug, console, images, one_line_errors, timm_name
from autogate.cli.functions import model_function
from autogate.files import inputs_of, load
from autogate.inspection import Inspection, Stage, check_drawable, counted, draw_coupling_graph, inspect_model, short
from autogate.outlook import what_if
from autogate.training import Network, build_network
from rewriters import AutogateError

ROUNDING = 1e-9
"""Relative; sums in float64 may be off in their last digits."""


@one_line_errors
def inspect(
    model: Annotated[str, typer.Argument(help="Name of a timm model, a slim file, or package.module:function.")],
    flops: Annotated[float, typer.Option(help="Share of the FLOPs to keep, in (0, 1].")] = 0.5,
    image_size: Annotated[
        int | None, typer.Option(min=1, help="Side of the images in pixels. Default: the model's own.")
    ] = None,
    classes: Annotated[int | None, typer.Option(min=0, help="Number of classes. Default: the model's own.")] = None,
    shortcuts: Annotated[
        str, typer.Option(help='"shared", or "conv" for 1x1 convolutions on identity shortcuts.')
    ] = "shared",
    ignore: Annotated[list[str] | None, typer.Option(help="Module whose channels all stay; can be repeated.")] = None,
    layers: Annotated[bool, typer.Option("--layers", help="Show FLOPs by layer instead of by stage.")] = False,
    trial: Annotated[
        bool, typer.Option("--what-if", help="Make models for 0.8, 0.5, 0.3 and 0.1 of the FLOPs, and time them.")
    ] = False,
    by: Annotated[str, typer.Option(help="Criterion of --what-if: l1, l2, lamp, fpgm, bn_scale or random.")] = "l1",
    graph: Annotated[Path | None, typer.Option(help="File to draw the coupling graph to (svg, png, pdf).")] = None,
    debug: Debug = False,
) -> None:
    """Show which channels of a model could be removed, which are pinned and why, and what a budget leaves.

    Prints groups of coupled channels, pinned channels, and FLOPs by stage. Nothing is trained or downloaded. With
    --what-if, prints instead the least that can be reached, and the widths and measured latency that some shares come
    to.

    Example: autogate inspect resnet50 --flops 0.5 --graph groups.svg
    """
    if graph is not None:
        check_drawable(graph)
    network, example = _network(model, classes, image_size)
    if trial:
        with console.status("making and timing slim models"):
            tried = what_if(network, example, by=by, ignore=ignore or (), shortcuts=shortcuts)
        console.print(tried.table(), markup=False, highlight=False, soft_wrap=True)
        return
    with console.status("analysing the model"):
        found = inspect_model(
            network, example, flops=flops, ignore=ignore or (), shortcuts=shortcuts, by_layer=layers
        )  # fmt: skip
    console.print(_groups(found, model))
    if found.pins:
        console.print(_pins(found))
    console.print(_stages(found, "layer" if layers else "stage"))
    console.print(_budget(found))
    if graph is not None:
        draw_coupling_graph(found.channel_map, graph)
        console.print(f"coupling graph drawn to {graph.resolve()}", soft_wrap=True, highlight=False, markup=False)
    if found.flops > flops * found.all_flops * (1 + ROUNDING):
        raise AutogateError(
            f"{flops:.1%} of the FLOPs can't be reached: {found.least:.1%} are left with the fewest channels.",
            where=model,
            remedy="Ask for a larger share.",
        )


def _groups(found: Inspection, name: str) -> Table:
    table = Table(
        "group", "channels", "output of", "input of", "FLOPs per channel", title=f"Removable channels of {name}"
    )
    for column in (table.columns[1], table.columns[4]):
        column.justify = "right"
    for index, group in enumerate(found.groups):
        table.add_row(
            str(index), counted(group.width, group.heads), _few(group.made_by), _few(group.read_by), short(group.price)
        )
    return table


def _few(names: tuple[str, ...], most: int = 3) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return escape(", ".join(names[:most]) + more)


def _pins(found: Inspection) -> Table:
    table = Table("pinned at", "op", "reason", "channels", title="Pinned channels")
    for pin in found.pins:
        sides = _few(tuple(map(str, pin.sides)), 1)
        table.add_row(escape(pin.place), escape(pin.op), escape(pin.reason), sides)
    return table


def _stages(found: Inspection, kind: str) -> Table:
    table = Table(kind, "FLOPs", "share", "left", title="FLOPs (multiply-adds) for one sample")
    for column in table.columns[1:]:
        column.justify = "right"
    for stage in (*found.stages, Stage("total", found.all_flops, found.flops)):
        part = stage.all_flops / found.all_flops if found.all_flops else 0.0
        left = stage.flops / stage.all_flops if stage.all_flops else 0.0
        table.add_row(escape(stage.name), short(stage.all_flops), f"{part:.1%}", f"{left:.0%}")
    return table


def _network(model: str, classes: int | None, side: int | None) -> tuple[nn.Module, Any]:
    """The model, and example inputs: for a slim file those that it was prepared with."""
    if not Path(model).is_file():
        function = model_function(model)
        named = Network(model if function else timm_name(model))
        network = build_network(named, classes, weights=False, function=function)
        return network, images(network, side)
    network = load(model)
    args, kwargs = inputs_of(network, 2, side)
    return network, kwargs or args


def _budget(found: Inspection) -> str:
    left = (
        f"{found.flops / found.all_flops:.1%} of {short(found.all_flops)} FLOPs and "
        f"{found.params / found.all_params:.1%} of {short(found.all_params)} parameters"
    )
    if found.keep is None:
        return f"The fewest channels that connect inputs to outputs leave {left}."
    return (
        f"If every group keeps {found.keep:.0%} of its channels, {left} are left. The smallest possible share of the "
        f"FLOPs is {found.least:.1%}."
    )
