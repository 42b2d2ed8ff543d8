"""`autogate inspect`: what could be removed from a model, before anything is trained."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from autogate.cli.common import Debug, console, images, one_line_errors, timm_model
from autogate.files import load
from autogate.inspection import Inspection, Stage, draw_coupling_graph, inspect_model, short


@one_line_errors
def inspect(
    model: Annotated[str, typer.Argument(help="Name of a timm model, or a file that autogate.save wrote.")],
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
    graph: Annotated[Path | None, typer.Option(help="File to draw the coupling graph to (svg, png, pdf).")] = None,
    debug: Debug = False,
) -> None:
    """Show which channels of a model could be removed, which are pinned and why, and what a budget leaves.

    Prints groups of coupled channels, pinned channels, and FLOPs by stage. Nothing is trained or downloaded.

    Example: autogate inspect resnet50 --flops 0.5 --graph groups.svg
    """
    network = load(model) if Path(model).suffix and Path(model).is_file() else timm_model(model, classes)
    with console.status("analysing the model"):
        found = inspect_model(
            network, images(network, image_size), flops=flops, ignore=ignore or (), shortcuts=shortcuts, by_layer=layers
        )
    console.print(_groups(found, model))
    if found.pins:
        console.print(_pins(found))
    console.print(_stages(found, "layer" if layers else "stage"))
    console.print(_budget(found))
    if graph is not None:
        draw_coupling_graph(found.channel_map, graph)
        console.print(f"coupling graph drawn to {graph.resolve()}", soft_wrap=True, highlight=False, markup=False)


def _groups(found: Inspection, name: str) -> Table:
    table = Table(
        "group", "channels", "output of", "input of", "FLOPs per channel", title=f"Removable channels of {name}"
    )
    for column in (table.columns[1], table.columns[4]):
        column.justify = "right"
    for index, group in enumerate(found.groups):
        table.add_row(str(index), str(group.width), _few(group.made_by), _few(group.read_by), short(group.price))
    return table


def _few(names: tuple[str, ...], most: int = 3) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return escape(", ".join(names[:most]) + more)


def _pins(found: Inspection) -> Table:
    table = Table("pinned at", "op", "reason", "channels", title="Pinned channels")
    for pin in found.pins:
        sides = _few(tuple(map(str, pin.sides)), 1)
        table.add_row(escape(pin.module or "(outputs)"), escape(pin.op), escape(pin.reason), sides)
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


def _budget(found: Inspection) -> str:
    return (
        f"If every group keeps {found.keep:.0%} of its channels, {found.flops / found.all_flops:.1%} of "
        f"{short(found.all_flops)} FLOPs and {found.params / found.all_params:.1%} of {short(found.all_params)} "
        f"parameters are left. The smallest possible share of the FLOPs is {found.least:.1%}."
    )
