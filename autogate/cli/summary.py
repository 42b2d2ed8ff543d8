"""`autogate summary`: what is left of a slim model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from autogate.cli.common import Debug, console, one_line_errors, written_model
from autogate.cli.functions import FunctionOption, slim_model
from autogate.inspection import summarise_adaptive, summarise_slim
from autogate.saliency import saliency_of


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
    network = slim_model(written_model(slim), model)
    bank = saliency_of(network)
    found = summarise_slim(network) if bank is None else summarise_adaptive(network, bank)
    if json:
        print(found.to_json())
    else:
        console.print(str(found), markup=False, highlight=False, soft_wrap=True)
