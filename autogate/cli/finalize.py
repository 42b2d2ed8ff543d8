"""`autogate finalize`: the slim model of a run that was not finished."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from autogate.cli.common import Debug, console, one_line_errors, one_line_warnings
from autogate.inspection import short
from autogate.training import finalize_checkpoint


@one_line_errors
def finalize(
    checkpoint: Annotated[Path, typer.Argument(help="A run's folder, or its last.pt.")],
    out: Annotated[Path | None, typer.Option(help="Where the slim model goes. slim.safetensors beside it.")] = None,
    debug: Debug = False,
) -> None:
    """Take the closed channels out of a run's model as its checkpoint has it, wherever training stands.

    A budget that is not met yet is told with the numbers. The run can be gone on with afterwards.

    Example: autogate finalize runs/resnet50
    """
    if not checkpoint.exists():
        raise typer.BadParameter(f"there is nothing at {checkpoint}.", param_hint="CHECKPOINT")
    with one_line_warnings(), console.status("finalizing"):
        found = finalize_checkpoint(checkpoint, out)
    result = found.result
    console.print(
        f"{found.file.resolve()}: {short(result.flops)} of {short(result.dense_flops)} FLOPs "
        f"({result.flops / result.dense_flops:.1%}), {short(result.params)} of {short(result.dense_params)} "
        f"parameters, after {result.step} of {result.steps} steps",
        soft_wrap=True,
        highlight=False,
    )
