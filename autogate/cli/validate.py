"""`autogate validate`: the accuracy of a slim model on a folder of images."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from autogate.cli.common import Debug, console, one_line_errors, one_line_warnings, written_model
from autogate.cli.functions import FunctionOption, slim_model
from autogate.training import Images, join_world
from autogate.training import validate as evaluate


@one_line_errors
def validate(
    slim: Annotated[Path, typer.Argument(help="Slim model, as written by autogate.save or autogate train.")],
    data: Annotated[str, typer.Option(help="As for autogate train, or the validation images alone.")],
    data_dir: Annotated[str | None, typer.Option(help="Folder of a named data set.")] = None,
    val_split: Annotated[str, typer.Option(help="Name of the part to evaluate on.")] = Images.val_split,
    image_size: Annotated[
        int | None, typer.Option(min=1, help="Side of the images in pixels. Default: as given to prepare.")
    ] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", "-b", min=1, help="Images per batch.")] = 64,
    workers: Annotated[
        int, typer.Option("--workers", "-j", min=0, help="Processes that load images.")
    ] = Images.workers,
    device: Annotated[str | None, typer.Option(help="cpu or cuda. Default: a GPU if there is one.")] = None,
    model: FunctionOption = None,
    debug: Debug = False,
) -> None:
    """Measure the accuracy of a slim model on the validation images of a folder.

    Example: autogate validate runs/resnet50/slim.safetensors --data imagenet/
    """
    images = Images(data, data_dir, val_split=val_split, batch_size=batch_size, workers=workers)
    written_model(slim)
    with one_line_warnings(), join_world(device) as world, console.status("evaluating"):
        found = evaluate(slim_model(slim, model).to(world.device), images, world, image_size)
    console.print(
        f"accuracy {100 * found.right / max(found.images, 1):.2f} % (top 1): {found.right} of {found.images} images at "
        f"{found.size} pixels",
        highlight=False,
        soft_wrap=True,
    )
