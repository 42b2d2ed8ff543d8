"""`autogate demo`: train, prune and check a small network, in a minute."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from autogate import demo as digits_demo
from autogate.cli.common import Debug, console, one_line_errors
from autogate.files import save


@one_line_errors
def demo(
    flops: Annotated[float, typer.Option(help="Share of the FLOPs to keep, in (0, 1].")] = 0.5,
    dense_epochs: Annotated[int, typer.Option(min=1, help="Epochs before gates are added.")] = 6,
    gated_epochs: Annotated[int, typer.Option(min=1, help="Epochs with gates.")] = 14,
    seed: Annotated[int, typer.Option(help="Seed for weights and data order.")] = 0,
    out: Annotated[Path, typer.Option(help="File for the slim model.")] = Path("autogate_demo_slim.safetensors"),
    debug: Debug = False,
) -> None:
    """Train, slim and check a small timm network on scikit-learn's handwritten digits, in a minute.

    Example: autogate demo --flops 0.3
    """
    torch.set_num_threads(1)  # fastest for a network this small
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("training", total=digits_demo.total_steps(dense_epochs, gated_epochs))
        outcome = digits_demo.run(
            flops, dense_epochs, gated_epochs, seed, lambda word: progress.update(task, advance=1, description=word)
        )
    console.print(_before_after(outcome))
    console.print(
        f"gated and slim network: different predictions on {outcome.differing} of the test images, outputs equal to "
        f"{outcome.error:.0e}"
    )
    save(outcome.model, out)
    console.print(f"slim model saved to {out.resolve()} (read it with autogate.load)", soft_wrap=True)


def _before_after(outcome: digits_demo.Outcome) -> Table:
    dense, slim = outcome.dense, outcome.slim
    table = Table("", "dense", "slim", "slim / dense", title=f"timm's {digits_demo.MODEL} on digits")
    for column in table.columns[1:]:
        column.justify = "right"
    table.add_row("FLOPs (M)", f"{dense.flops / 1e6:.2f}", f"{slim.flops / 1e6:.2f}", f"{slim.flops / dense.flops:.3f}")
    table.add_row("parameters (k)", *_thousands(dense.params, slim.params), f"{slim.params / dense.params:.3f}")
    table.add_row("accuracy (%)", f"{dense.accuracy:.1f}", f"{slim.accuracy:.1f}", "")
    latency = f"{dense.latency * 1e3:.2f}", f"{slim.latency * 1e3:.2f}", f"{slim.latency / dense.latency:.2f}"
    table.add_row("latency, 1 image (ms)", *latency)
    return table


def _thousands(*counts: int) -> list[str]:
    return [f"{count / 1e3:.1f}" for count in counts]
