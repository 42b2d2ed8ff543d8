"""`autogate summary`: what is left of a slim model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from autogate.cli.common import Debug, console, one_line_errors, written_model
from autogate.cli.functions import FunctionOption, slim_model
from autogate.inspection import summarise_slim


@one_line_errors
def summary(
    slim: Annotated[Path, typer.Argument(help="Slim model, as written by autogate.save or autogate train.")],
    json: Annotated[bool, typer.Option("--json", help="Print JSON, for other programs.")] = False,
    model: FunctionOption = None,
    debug: Debug = False,
) -> None:
    """Show what is left of a slim model: widths before and after, layer by layer, and what was removed.

    Example: autogate summary runs/resnet50/slim.safetensors
    """
    found = summarise_slim(slim_model(written_model(slim), model))
    if json:
        print(found.to_json())
    else:
        console.print(str(found), markup=False, highlight=False, soft_wrap=True)
