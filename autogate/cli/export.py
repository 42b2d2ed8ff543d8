"""`autogate export`: write a slim model for other runtimes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from autogate.cli.common import Debug, console, one_line_errors, written_model
from autogate.cli.functions import FunctionOption, slim_model
from autogate.files import to_onnx, to_torch_export


@one_line_errors
def export(
    slim: Annotated[Path, typer.Argument(help="Slim model, as written by autogate.save or autogate train.")],
    onnx: Annotated[Path | None, typer.Option(help="ONNX file to write.")] = None,
    torch_export: Annotated[Path | None, typer.Option(help="torch.export program (.pt2) to write.")] = None,
    image_size: Annotated[
        int | None, typer.Option(min=1, help="Side of the images in pixels. Default: as given to prepare.")
    ] = None,
    model: FunctionOption = None,
    debug: Debug = False,
) -> None:
    """Export a slim model to ONNX or torch.export, for batches of any size.

    Each file is read back and its outputs are compared with the model's; different outputs are an error.

    Example: autogate export slim.safetensors --onnx slim.onnx --torch-export slim.pt2
    """
    if onnx is None and torch_export is None:
        raise typer.BadParameter("give --onnx FILE, --torch-export FILE or both.", param_hint="--onnx")
    network = slim_model(written_model(slim), model)
    for path, write in ((torch_export, to_torch_export), (onnx, to_onnx)):
        if path is not None:
            with console.status(f"writing {path}"):
                error = write(network, path, image_size)
            console.print(f"{path.resolve()}: outputs equal to {error:.0e}", soft_wrap=True, highlight=False)
