"""`autogate bench`: latency and throughput of a slim model, compared with the dense one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.table import Table
from torch import nn

from autogate.cli.bench_adaptive import BATCHES, bench_adaptive
from autogate.cli.common import Debug, console, one_line_errors, written_model
from autogate.cli.functions import FunctionOption, dense_by, slim_model
from autogate.files import dense_model
from autogate.inspection import (
    Comparison,
    Duration,
    Summary,
    compare,
    compare_onnx,
    short,
    summarise_slim,
    time_subnets,
)
from autogate.saliency import saliency_of
from autogate.switching import subnets_of
from rewriters import AutogateError


@one_line_errors
def bench(
    slim: Annotated[Path, typer.Argument(help="Slim model, as written by autogate.save or autogate train.")],
    batch_size: Annotated[
        list[int] | None,
        typer.Option(min=1, help="Samples per batch; can be repeated. Default: 1, 64 (adaptive: 1, 8, 64)."),
    ] = None,
    image_size: Annotated[
        int | None, typer.Option(min=1, help="Side of the images in pixels. Default: as given to prepare.")
    ] = None,
    device: Annotated[
        list[str] | None, typer.Option(help="cpu or cuda; can be repeated. Default: all available.")
    ] = None,
    eager: Annotated[bool, typer.Option("--eager", help="Measure only without torch.compile.")] = False,
    seconds: Annotated[float, typer.Option(min=0.01, help="Time to measure each model for, in seconds.")] = 1.0,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads. Default: torch's.")] = None,
    images: Annotated[
        Path | None, typer.Option(exists=True, file_okay=False, help="Images for an adaptive model. Default: random.")
    ] = None,
    model: FunctionOption = None,
    debug: Debug = False,
) -> None:
    """Measure latency and throughput of a slim model and of its dense model.

    On the CPU their ONNX files are timed in onnxruntime too, where that is installed.

    A switchable model's subnets are measured in it, without torch.compile, and the time of switching to each.

    An adaptive model is timed on images, beside a static model with as many FLOPs, without torch.compile.

    The dense model has random weights. Prints the median of all measurements, with quartiles.

    Example: autogate bench slim.safetensors --batch-size 1 --batch-size 64 --device cpu
    """
    if threads is not None:
        torch.set_num_threads(threads)
    table = Table(
        "device", "batch", "dense (ms)", "slim (ms)", "slim / dense", "slim, samples/s", title="Median (quartiles)"
    )
    for column in table.columns[1:]:
        column.justify = "right"
    network = slim_model(written_model(slim), model)
    if subnets_of(network) is not None:
        _bench_subnets(network, batch_size or [1, 64], device, seconds, image_size)
        return
    dense = dense_model(slim) if model is None else dense_by(model, slim)
    if saliency_of(network) is not None:
        bench_adaptive(network, dense, batch_size or BATCHES, device, seconds, images, image_size)
        return
    if images is not None:
        raise typer.BadParameter("it is for models that choose their channels for each image.", param_hint="--images")
    models = dense, network
    modes = (False,) if eager else (False, True)
    with console.status("measuring"):
        for found in compare(
            *models, batches=batch_size or (1, 64), devices=device, compiled=modes, seconds=seconds, side=image_size
        ):
            table.add_row(*_row(found))
        if not device or "cpu" in device:
            for found in _in_onnxruntime(*models, batch_size or (1, 64), seconds, image_size):
                table.add_row(*_row(found))
    console.print(table)
    left = summarise_slim(models[1])
    console.print(_left(left), highlight=False, soft_wrap=True)
    for name, text in () if left.data_config is None else left.data_config.rows():
        console.print(f"{name}: {text}", markup=False, highlight=False, soft_wrap=True)
    console.print(f"CPU threads: {torch.get_num_threads()}, torch {torch.__version__}", highlight=False)


def _bench_subnets(
    model: nn.Module, batches: Sequence[int], devices: Sequence[str] | None, seconds: float, side: int | None
) -> None:
    """A row for each subnet of a switchable model."""
    for device in devices or ("cpu", *(("cuda",) if torch.cuda.is_available() else ())):
        table = Table(
            "subnet", "FLOPs", "parameters", *(f"batch of {batch} (ms)" for batch in batches), "switch, new (ms)",
            "switch, kept (ms)", title=f"{device}, eager: median (quartiles)",
        )  # fmt: skip
        for column in table.columns[1:]:
            column.justify = "right"
        with console.status("measuring"):
            timed = time_subnets(model.to(device), batches, seconds, side)
        for one in timed:
            shares = one.structure.shares
            table.add_row(
                one.structure.name, f"{shares['FLOPs']:.1%}", f"{shares['parameters']:.1%}", *map(str, one.times),
                *(f"{1e3 * time:.3g}" for time in (one.switch_new, one.switch_kept)),
            )  # fmt: skip
        console.print(table)
    console.print(f"CPU threads: {torch.get_num_threads()}, torch {torch.__version__}", highlight=False)


def _in_onnxruntime(
    dense: nn.Module, slim: nn.Module, batches: Sequence[int], seconds: float, side: int | None
) -> tuple[Comparison, ...]:
    """The timings in onnxruntime; none, with a line that says why, where it is missing or can't run the models."""
    try:
        return tuple(compare_onnx(dense, slim, batches=batches, seconds=seconds, side=side))
    except AutogateError as error:
        console.print(f"not timed in onnxruntime: {error}", markup=False, highlight=False, soft_wrap=True)
        return ()


def _left(found: Summary) -> str:
    flops, params = found.flops / found.all_flops, found.params / found.all_params
    return (
        f"{short(found.flops)} of {short(found.all_flops)} FLOPs ({flops:.1%}), {short(found.params)} of "
        f"{short(found.all_params)} parameters ({params:.1%}) are left, {len(found.removed)} modules removed, "
        f"{len(found.rewritten)} forwards rewritten; autogate summary lists them"
    )


def _row(found: Comparison) -> tuple[str, ...]:
    place = f"{found.device}, {found.runner}"
    ratio = speed = "-"
    if isinstance(found.slim, Duration):
        speed = short(found.batch / found.slim.median)
        if isinstance(found.dense, Duration):
            ratio = f"{found.slim.median / found.dense.median:.2f}"
    return place, str(found.batch), str(found.dense), str(found.slim), ratio, speed
