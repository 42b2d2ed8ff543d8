"""`autogate bench` of a model that chooses its channels for each image: its time on images, beside a static model's."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from timm.data import create_dataset, create_transform
from torch import Tensor, nn

from autogate import adaptive
from autogate.api import finalize, prepare
from autogate.cli.common import console
from autogate.closing import close
from autogate.files import inputs_of
from autogate.inspection import Duration, time_in_turns
from autogate.saliency import Use
from autogate.skipping import forwards_in
from autogate.training import Network, data_config
from rewriters import AutogateError
from rewriters.recording import tensors_of

MOST_IMAGES = 256
"""Images that are drawn from a folder."""

BATCHES = (1, 8, 64)
"""Batch sizes that are timed if none is named."""


def bench_adaptive(
    model: nn.Module, dense: nn.Module, batches: Sequence[int], devices: Sequence[str] | None, seconds: float,
    folder: Path | None, side: int | None,
) -> None:  # fmt: skip
    """Print the time of the dense model, of a static one with as many FLOPs, and of the adaptive one.

    Args:
        model: the adaptive model; finalized here if it isn't.
        dense: its dense model.
        batches: numbers of images.
        devices: the CPU and, if there is one, the GPU if None.
        seconds: minimum time to measure each model for.
        folder: of images; random ones if None.
        side: side of square images, if not that of the example inputs.
    """
    images = _drawn(model, max(batches), side) if folder is None else _from_folder(model, folder, side)
    if not forwards_in(model):
        with console.status("finalizing"):
            adaptive.finalize(model, images[:2], warn=False)
    use = adaptive.use(model, images.split(64))
    static = _static(dense, images[:2], float(use.shares.mean()))
    for device in devices or ("cpu", *(("cuda",) if torch.cuda.is_available() else ())):
        table = Table(
            "batch", "dense (ms)", "static (ms)", "adaptive (ms)", "static / dense", "adaptive / dense",
            title=f"{device}, eager: median (quartiles)",
        )  # fmt: skip
        for column in table.columns:
            column.justify = "right"
        with console.status("measuring"):
            for batch in batches:
                given = _batches(images.to(device), batch)
                models = [one if one is None else one.to(device).eval() for one in (dense, static, model)]
                turns: list[Any] = [_InTurn(one, given) for one in models if one is not None]
                found: list[Duration | str] = list(time_in_turns(turns, ((), {}), seconds))
                if static is None:
                    found.insert(1, "-")
                table.add_row(str(batch), *_row(found))
        console.print(table)
    _print_use(use, folder)
    console.print(f"CPU threads: {torch.get_num_threads()}, torch {torch.__version__}", highlight=False)


class _InTurn:
    """Runs a model on one batch after the other, from the first again: images differ in their costs."""

    def __init__(self, model: nn.Module, batches: Sequence[Tensor]):
        self._model, self._batches, self._at = model, batches, -1

    def __call__(self) -> Any:
        self._at = (self._at + 1) % len(self._batches)
        return self._model(self._batches[self._at])


def _batches(images: Tensor, size: int) -> list[Tensor]:
    """Full batches; images are taken again if there are too few."""
    repeated = images.repeat(-(-size // len(images)), *[1] * (images.ndim - 1))
    return [batch for batch in repeated.split(size) if len(batch) == size]


def _static(dense: nn.Module, example: Tensor, share: float) -> nn.Module | None:
    """A slim model with this share of the FLOPs for every image; None, with a line that says why, if that can't be."""
    try:
        model = prepare(copy.deepcopy(dense), example, flops=share)
        return finalize(close(model, by="l1"), warn=False)
    except AutogateError as error:
        console.print(f"no static model was timed: {error}", markup=False, highlight=False, soft_wrap=True)
        return None


def _drawn(model: nn.Module, count: int, side: int | None) -> Tensor:
    (images,) = tensors_of(inputs_of(model, count, side))
    return images


def _from_folder(model: nn.Module, folder: Path, side: int | None) -> Tensor:
    """Images of a folder, drawn at random and transformed as for timm's evaluation."""
    config = data_config(model, Network("", img_size=side))
    try:
        found = create_dataset("", root=str(folder))
    except RuntimeError as error:  # timm's message names the folder and the file suffixes it looks for
        raise AutogateError(f"{error}.", where=f"--images {folder}") from error
    found.transform = create_transform(
        config["input_size"], interpolation=config["interpolation"], mean=config["mean"], std=config["std"],
        crop_pct=config["crop_pct"], crop_mode=config["crop_mode"],
    )  # fmt: skip
    drawn = torch.randperm(len(found), generator=torch.Generator().manual_seed(0))[:MOST_IMAGES]
    return torch.stack([found[index][0] for index in drawn.tolist()])


def _row(found: Sequence[Duration | str]) -> tuple[str, ...]:
    dense, static, own = found
    return *map(str, found), _ratio(static, dense), _ratio(own, dense)


def _ratio(one: Duration | str, other: Duration | str) -> str:
    return f"{one.median / other.median:.2f}" if isinstance(one, Duration) and isinstance(other, Duration) else "-"


def _print_use(use: Use, folder: Path | None) -> None:
    low, mean, high = (float(value) for value in (use.shares.min(), use.shares.mean(), use.shares.max()))
    kind = "images" if folder is not None else "random images: real ones (--images) may take another share"
    console.print(
        f"an image takes {mean:.1%} of the FLOPs on average ({low:.1%} to {high:.1%}), as the static model does; "
        f"{len(use.shares)} {kind}",
        highlight=False, soft_wrap=True,
    )  # fmt: skip
