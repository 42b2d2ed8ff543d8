"""The command line: `autogate --help`.

Each command is a file that reads options and prints tables. What it prints comes as plain values from
`autogate.inspection` (inspect, bench), `autogate.files` (export), `autogate.demo`, `autogate.training` (train,
finalize) and `autogate.reporting` (report).
"""

from __future__ import annotations

import typer

from autogate.cli.bench import bench
from autogate.cli.demo import demo
from autogate.cli.export import export
from autogate.cli.finalize import finalize
from autogate.cli.inspect import inspect
from autogate.cli.report import report
from autogate.cli.train import train

app = typer.Typer(no_args_is_help=True, pretty_exceptions_show_locals=False, rich_markup_mode="rich")


@app.callback()
def main() -> None:
    """Learn which channels a PyTorch model can do without, then make the model physically smaller.

    Exit codes: 0 success; 1 error; 2 wrong usage; 130 or 143 a run was stopped by Ctrl-C or SIGTERM and can be resumed.
    """


app.command()(demo)
app.command()(inspect)
app.command()(train)
app.command()(finalize)
app.command()(report)
app.command()(bench)
app.command()(export)

__all__ = ["app"]
