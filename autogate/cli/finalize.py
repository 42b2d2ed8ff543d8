"""`autogate finalize`: make the slim model of an unfinished run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from autogate.cli.common import Debug, console, one_line_errors, one_line_warnings
from autogate.cli.functions import FunctionOption, model_function
from autogate.inspection import short
from autogate.training import finalize_checkpoint


@one_line_errors
def finalize(
    checkpoint: Annotated[Path, typer.Argument(help="Folder of a run, or its last.pt.")],
    out: Annotated[
        Path | None, typer.Option(help="File for the model. Default: slim.safetensors next to the checkpoint.")
    ] = None,
    model: FunctionOption = None,
    debug: Debug = False,
) -> None:
    """Make the slim model of a run from its last checkpoint, however far training is.

    If the budget is not met yet, a warning says so with the numbers. The run can be resumed afterwards. Of a run with
    --subnets it makes the switchable model, once the channels of all widths are found.

    Example: autogate finalize runs/resnet50
    """
    if not checkpoint.exists():
        raise typer.BadParameter(f"there is nothing at {checkpoint}.", param_hint="CHECKPOINT")
    with one_line_warnings(), console.status("finalizing"):
        found = finalize_checkpoint(checkpoint, out, model_function(model, "--model"))
    result = found.result
    what = f"subnets {', '.join(found.subnets)}"
    if not found.subnets:
        what = (
            f"{short(result.flops)} of {short(result.dense_flops)} FLOPs ({result.flops / result.dense_flops:.1%}), "
            f"{short(result.params)} of {short(result.dense_params)} parameters"
        )
    console.print(
        f"{found.file.resolve()}: {what}, after {result.step} of {result.steps} steps", soft_wrap=True, highlight=False
    )
