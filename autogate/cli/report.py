"""`autogate report`: a page that shows a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from autogate.cli.common import Debug, console, one_line_errors
from autogate.reporting import read_report, write_report


@one_line_errors
def report(
    run: Annotated[Path, typer.Argument(help="A folder that autogate train wrote.")],
    out: Annotated[Path | None, typer.Option(help="The folder for it. RUN/report.")] = None,
    latency: Annotated[bool, typer.Option("--latency", help="Time the slim model beside the dense one.")] = False,
    batch_size: Annotated[list[int] | None, typer.Option(min=1, help="To time; can be repeated. 1 and 64.")] = None,
    debug: Debug = False,
) -> None:
    """Show a run on a page of its own, with pictures: channels, gates, FLOPs and accuracy over time, coupling.

    The page loads nothing from elsewhere. The run need not be finished.

    Example: autogate report runs/resnet50 --latency
    """
    if not run.is_dir():
        raise typer.BadParameter(f"there is no folder {run}.", param_hint="RUN")
    with console.status("drawing"):
        page = write_report(read_report(run, latency, batch_size or (1, 64)), out or run / "report")
    console.print(f"report: {page.resolve()}", soft_wrap=True, highlight=False)
