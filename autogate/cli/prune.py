"""`autogate prune`: slim a timm model at once, by a criterion, without training."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated, get_args

import typer
from rich.markup import escape
from rich.table import Table

from autogate.cli.common import Debug, console, errors, one_line_errors, one_line_warnings, timm_name
from autogate.cli.functions import model_function
from autogate.criteria import CRITERIA, Allocation
from autogate.inspection import short
from autogate.training import Budget, Folder, Network, Pruned
from autogate.training import prune as pruned_by


@one_line_errors
def prune(
    model: Annotated[str, typer.Argument(help="Name of a timm model, or package.module:function.")],
    by: Annotated[str, typer.Option(help=f"Criterion: {', '.join(CRITERIA)}.")] = "l1",
    allocation: Annotated[str, typer.Option(help='"global", or "uniform": the same part of all layers.')] = "global",
    flops: Annotated[float | None, typer.Option(help="Share of the FLOPs to keep; 0.5 if no share is given.")] = None,
    params: Annotated[float | None, typer.Option(help="Share of the parameters to keep.")] = None,
    activations: Annotated[float | None, typer.Option(help="Share of the bytes that layers output, to keep.")] = None,
    latency: Annotated[float | None, typer.Option(help="Share of the time for one image, on this machine.")] = None,
    round_to: Annotated[int, typer.Option(min=1, help="Make widths multiples of this.")] = 1,
    ignore: Annotated[list[str] | None, typer.Option(help="Module whose channels all stay; can be repeated.")] = None,
    weights: Annotated[Path | None, typer.Option(exists=True, help="File of the model's weights.")] = None,
    pretrained: Annotated[bool, typer.Option("--pretrained", help="Take timm's weights.")] = False,
    classes: Annotated[int | None, typer.Option(min=1, help="Number of classes. Default: the model's own.")] = None,
    image_size: Annotated[int | None, typer.Option(min=1, help="Side of the images. Default: the model's own.")] = None,
    data: Annotated[Path | None, typer.Option(exists=True, help="Folder of images, for criteria and accuracy.")] = None,
    batches: Annotated[int, typer.Option(min=1, help="Batches of images that the criterion looks at.")] = 50,
    batch_size: Annotated[int, typer.Option("--batch-size", "-b", min=1, help="Images per batch.")] = 32,
    workers: Annotated[int, typer.Option("--workers", "-j", min=0, help="Processes that load images.")] = 4,
    compensate: Annotated[
        bool, typer.Option("--compensate", help="Let what stays make up for what goes, on up to 256 of these images.")
    ] = False,
    recalibrate: Annotated[
        bool, typer.Option("--recalibrate", help="Recompute batch norms' statistics on these batches.")
    ] = False,
    device: Annotated[str | None, typer.Option(help="cpu or cuda. Default: cuda if there is some.")] = None,
    out: Annotated[Path, typer.Option(help="File for the slim model.")] = Path("slim.safetensors"),
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    debug: Debug = False,
) -> None:
    """Slim a timm model at once: the channels that score lowest by a criterion go. Nothing is trained.

    Prints the widths before and after, and the accuracy of both where --data has as many class folders as the model has
    outputs. Fine-tune the slim model afterwards: autogate.load returns it.

    Example: autogate prune resnet50 --pretrained --by taylor --flops 0.6 --data imagenet/ --out slim.safetensors
    """
    _check(by, allocation, weights, pretrained)
    if data is None:
        _check_without_data(by, compensate, recalibrate)
    function = model_function(model)
    name = model if function else timm_name(model)
    network = Network(name, pretrained, None if weights is None else str(weights), classes, image_size)
    if not (pretrained or weights or function):
        errors.print("[yellow]warning:[/] without --pretrained or --weights the weights are random")
    budget = Budget(flops, params, activations, latency, round_to, ignore=tuple(ignore or ()))
    folder = None if data is None else Folder(data, batches, batch_size, workers)
    with one_line_warnings():
        found = pruned_by(
            network, budget, out, by=by, allocation=allocation,  # type: ignore[arg-type]
            folder=folder, compensate=compensate, recalibrated=recalibrate, device=device, function=function,
        )  # fmt: skip
    if as_json:
        print(json.dumps(dataclasses.asdict(found), indent=1))
    else:
        _print(found)


def _check(by: str, allocation: str, weights: Path | None, pretrained: bool) -> None:
    """Raise for options that don't go together."""
    if by not in CRITERIA:
        raise typer.BadParameter(f"there is no criterion {by!r}. There are {', '.join(CRITERIA)}.", param_hint="--by")
    if allocation not in get_args(Allocation):
        raise typer.BadParameter(f"it is {' or '.join(get_args(Allocation))}.", param_hint="--allocation")
    if pretrained and weights is not None:
        raise typer.BadParameter("it can't be given with --pretrained.", param_hint="--weights")


def _check_without_data(by: str, compensate: bool, recalibrate: bool) -> None:
    """Raise for options that need images."""
    needy = {"--compensate": compensate, "--recalibrate": recalibrate, f"--by {by}": CRITERIA[by].needs != "weights"}
    for option, given in needy.items():
        if given:
            raise typer.BadParameter(f"{option} needs images.", param_hint="--data")


def _print(found: Pruned) -> None:
    table = Table("layer", "before", "after", title="Output channels")
    for column in table.columns[1:]:
        column.justify = "right"
    for layer, (before, after) in found.widths.items():
        table.add_row(escape(layer), str(before), str(after))
    console.print(table)
    told = (
        f"{Path(found.file).resolve()}: {short(found.flops)} of {short(found.dense_flops)} FLOPs "
        f"({found.flops / found.dense_flops:.1%}), {short(found.params)} of {short(found.dense_params)} parameters"
    )
    if found.accuracy is not None and found.dense_accuracy is not None:
        told += f", accuracy {found.accuracy:.2f} %, {found.dense_accuracy:.2f} % before"
    console.print(told, soft_wrap=True, highlight=False)
