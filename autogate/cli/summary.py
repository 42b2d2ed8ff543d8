"""`autogate summary`: what is left of a slim model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from autogate.cli.common import Debug, console, one_line_errors, written_model
from autogate.files import load
from autogate.inspection import summarise_adaptive, summarise_slim
from autogate.saliency import saliency_of


@one_line_errors
def summary(
    slim: Annotated[Path, typer.Argument(help="Slim model, as written by autogate.save or autogate train.")],
    json: Annotated[bool, typer.Option("--json", help="Print JSON, for other programs.")] = False,
    debug: Debug = False,
) -> None:
    """Show what is left of a slim model: widths before and after, layer by layer, and what was removed.

    Example: autogate summary runs/resnet50/slim.safetensors
    """
    model = load(written_model(slim))
    bank = saliency_of(model)
    found = summarise_slim(model) if bank is None else summarise_adaptive(model, bank)
    if json:
        print(found.to_json())
    else:
        console.print(str(found), markup=False, highlight=False, soft_wrap=True)
