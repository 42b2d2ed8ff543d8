"""`autogate export`: a slim model for other runtimes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from autogate.cli.common import Debug, console, one_line_errors, written_model
from autogate.files import load, to_onnx, to_torch_export


@one_line_errors
def export(
    slim: Annotated[Path, typer.Argument(help="A file that autogate.save wrote.")],
    onnx: Annotated[Path | None, typer.Option(help="Write an ONNX file here.")] = None,
    torch_export: Annotated[Path | None, typer.Option(help="Write a torch.export program (.pt2) here.")] = None,
    image_size: Annotated[int | None, typer.Option(min=1, help="Side of the images, if not that of prepare.")] = None,
    debug: Debug = False,
) -> None:
    """Write a slim model as an ONNX file or a torch.export program, for batches of any size.

    What was written is read back and run beside the model; other outputs are an error.

    Example: autogate export slim.safetensors --onnx slim.onnx --torch-export slim.pt2
    """
    if onnx is None and torch_export is None:
        raise typer.BadParameter("give --onnx FILE, --torch-export FILE or both.", param_hint="--onnx")
    model = load(written_model(slim))
    for path, write in ((torch_export, to_torch_export), (onnx, to_onnx)):
        if path is not None:
            with console.status(f"writing {path}"):
                error = write(model, path, image_size)
            console.print(f"{path.resolve()}: outputs equal to {error:.0e}", soft_wrap=True, highlight=False)
