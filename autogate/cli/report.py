"""`autogate report`: a page about a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from autogate.cli.common import Debug, console, one_line_errors
from autogate.cli.functions import FunctionOption, model_function
from autogate.reporting import read_report, write_report


@one_line_errors
def report(
    run: Annotated[Path, typer.Argument(help="Folder of a run, written by autogate train.")],
    out: Annotated[Path | None, typer.Option(help="Folder for the page. Default: RUN/report.")] = None,
    latency: Annotated[
        bool, typer.Option("--latency", help="Measure the latency of the slim and the dense model too.")
    ] = False,
    batch_size: Annotated[
        list[int] | None,
        typer.Option(min=1, help="Samples per batch for --latency; can be repeated. Default: 1 and 64."),
    ] = None,
    model: FunctionOption = None,
    debug: Debug = False,
) -> None:
    """Write an HTML page about a run: what is left and accuracy over time, channels of each layer, gates.

    The page is self-contained. The run need not be finished.

    Example: autogate report runs/resnet50 --latency
    """
    if not run.is_dir():
        raise typer.BadParameter(f"there is no folder {run}.", param_hint="RUN")
    function = model_function(model, "--model")
    with console.status("drawing"):
        page = write_report(read_report(run, latency, batch_size or (1, 64), function), out or run / "report")
    console.print(f"report: {page.resolve()}", soft_wrap=True, highlight=False)
