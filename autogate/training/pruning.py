"""Slim a timm model at once, by a criterion, and measure its accuracy before and after: what `autogate prune` does."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timm.data import create_dataset, create_transform
from torch import nn
from torch.utils.data import DataLoader, Subset

from autogate.api import finalize, gated_summary, prepare
from autogate.closing import close
from autogate.criteria import CRITERIA, Allocation
from autogate.files import save
from autogate.slim import recalibrate
from autogate.training.data import on_device
from autogate.training.learning import accuracy
from autogate.training.network import ModelFunction, build_network, data_config, note_data_config, outputs_of
from autogate.training.recipe import Budget, Network
from rewriters import AutogateError


@dataclass(frozen=True)
class Folder:
    """Images for a criterion, and to measure accuracy on.

    Attributes:
        path: a folder with train/ and validation/ (or val/), or one folder, whose images serve for both.
        batches: batches for the criterion, drawn from the training images.
        batch_size: images per batch.
        workers: processes that load images.
    """

    path: Path
    batches: int = 50
    batch_size: int = 32
    workers: int = 0


@dataclass(frozen=True)
class Pruned:
    """What `prune` made.

    Attributes:
        file: the slim model, for `autogate.load`.
        widths: output channels of each layer, before and after, by its path.
        flops, dense_flops: multiply-adds for one image.
        params, dense_params: parameters.
        accuracy, dense_accuracy: top 1 in percent; None if the images have no labels that fit the model.
    """

    file: str
    widths: Mapping[str, tuple[int, int]]
    flops: float
    dense_flops: float
    params: int
    dense_params: int
    accuracy: float | None = None
    dense_accuracy: float | None = None


@dataclass(frozen=True)
class _Images:
    """Loaded images: batches for the criterion, and those to measure on (None without labels that fit).

    `names` are those of the classes; empty without labels that fit.
    """

    calibration: DataLoader[Any]
    labelled: DataLoader[Any] | None
    names: tuple[str, ...] = ()


def prune(
    network: Network,
    budget: Budget,
    out: Path,
    *,
    by: str = "l1",
    allocation: Allocation = "global",
    folder: Folder | None = None,
    compensate: bool = False,
    recalibrated: bool = False,
    device: str | None = None,
    function: ModelFunction | None = None,
) -> Pruned:
    """Build a timm model, close gates by a criterion, make it slim and save it.

    Args:
        network: what to build, and its weights.
        budget: what is to be left.
        out: file for the slim model.
        by, allocation, compensate: see `autogate.close`.
        folder: images; for criteria that need some, for compensation, and for the accuracy before and after.
        recalibrated: recompute the statistics of batch norms on the batches of the folder.
        device: where to run; CUDA if there is some, else the CPU, if None.
        function: as for `start`.

    Raises:
        AutogateError: as for `autogate.prepare` and `autogate.close`; or the folder has no images, or none with labels
            where the criterion needs them.
    """
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    model = build_network(network, network.num_classes, function=function).to(place).eval()
    config = data_config(model, network)
    classes = 0 if folder is None else outputs_of(model, config["input_size"])
    images = None if folder is None else _load(folder, classes, config)
    if images is not None and CRITERIA[by].needs == "loss" and images.labelled is None:
        raise AutogateError(
            f"the criterion {by!r} needs labels.",
            where=f"--data {folder.path if folder else ''}",
            remedy=f"Put the images of each of the model's {classes} classes into a folder of its own.",
        )
    note_data_config(model, config, () if images is None else images.names, classes)
    before = _measure(model, images)
    shares: dict[str, Any] = {
        "flops": budget.flops, "params": budget.params, "activations": budget.activations, "latency": budget.latency
    }  # fmt: skip
    prepare(
        model, torch.randn(2, *config["input_size"], device=place), **shares, round_to=budget.round_to,
        ignore=budget.ignore, shortcuts=budget.shortcuts,
    )  # fmt: skip
    batches = None if images is None else images.calibration
    close(model, by, batches=batches, loss=F.cross_entropy, allocation=allocation, compensate=compensate)
    found = gated_summary(model)
    finalize(model)
    if recalibrated and images is not None:
        recalibrate(model, images.calibration, batches=len(images.calibration))
    save(model, out)
    return Pruned(
        file=str(out),
        widths={layer.module: (layer.all_outputs, layer.outputs) for layer in found.layers},
        flops=found.flops,
        dense_flops=found.all_flops,
        params=found.params,
        dense_params=found.all_params,
        accuracy=_measure(model, images),
        dense_accuracy=before,
    )


def _measure(model: nn.Module, images: _Images | None) -> float | None:
    """Accuracy in percent; None without labels."""
    if images is None or images.labelled is None:
        return None
    device = next(model.parameters()).device
    right, seen = accuracy(model, on_device(images.labelled, device))
    return 100 * right / seen


def _load(folder: Folder, classes: int, config: Mapping[str, Any]) -> _Images:
    """Open the images of a folder, transformed as for timm's evaluation."""
    try:
        train, val = (create_dataset("", root=str(folder.path), split=split) for split in ("train", "validation"))
    except RuntimeError as error:  # timm's message names the folder and the file suffixes it looks for
        raise AutogateError(f"{error}.", where=f"--data {folder.path}") from error
    names = dict(train.reader.class_to_idx)
    fits = len(names) == classes > 1 and set(val.reader.class_to_idx) <= set(names)
    if fits:  # timm numbers the classes of each part by itself
        val = create_dataset("", root=val.reader.root, search_split=False, class_map=names)
    for part in (train, val):
        part.transform = create_transform(
            config["input_size"], interpolation=config["interpolation"], mean=config["mean"], std=config["std"],
            crop_pct=config["crop_pct"], crop_mode=config["crop_mode"],
        )  # fmt: skip
    drawn = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))  # a folder is sorted by class
    some = Subset(train, drawn[: folder.batches * folder.batch_size].tolist())
    calibration = DataLoader(some, folder.batch_size, num_workers=folder.workers)
    labelled = DataLoader(val, folder.batch_size, num_workers=folder.workers) if fits else None
    return _Images(calibration, labelled, tuple(names) if fits else ())
