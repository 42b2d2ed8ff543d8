"""The images of a run: timm's data sets, transforms and loaders."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from timm.data import create_dataset, create_loader
from torch.utils.data import IterableDataset

from autogate.training.distributed import World
from autogate.training.recipe import Images
from rewriters import AutogateError

KINDS = ("torch", "tfds", "hfds", "hfids", "wds")
"""Prefixes of the names that `timm.data.create_dataset` accepts."""

SHORT_NAMES = {"cifar10": "torch/cifar10", "cifar100": "torch/cifar100"}


@dataclass(frozen=True)
class DataSets:
    """The training and validation part of a data set, and its classes' names by number (None if it doesn't say)."""

    train: Any
    val: Any
    class_names: tuple[str, ...] | None

    @property
    def num_classes(self) -> int | None:
        return None if self.class_names is None else len(self.class_names)


@dataclass(frozen=True)
class Labelled:
    """Images with labels to evaluate on, and their classes' names by number (None if the data set doesn't say)."""

    images: Any
    class_names: tuple[str, ...] | None


@dataclass(frozen=True)
class Loaders:
    """Loaders of batches: images (N, C, H, W), float32 and normalised, and labels (N,).

    Attributes:
        train: shuffled, without the last incomplete batch.
        val: every image once; with several processes, some may see a few images at the end twice.
        val_share: number of its validation images that a process counts; None to count all.
    """

    train: Any
    val: Any
    val_share: int | None


def find_data(images: Images) -> DataSets:
    """Open the data set that a recipe asks for.

    Raises:
        AutogateError: it doesn't exist, it has no images or not two parts, or its parts have different classes.
    """
    _check_counts(images)
    if os.path.isdir(images.data):
        return _from_folder(images)
    train, val = (_named(images, split, split == images.train_split) for split in _splits(images))
    return DataSets(train, val, _classes_of(train))


def find_labelled(images: Images, names: Sequence[str] | None, outputs: int) -> Labelled:
    """Open the part of a data set that a trained model is to be evaluated on: `images.val_split`, or the whole folder.

    The classes of a folder are numbered by `names` if these have all of them, else as those of the training images
    beside it, else in the order of the alphabet.

    Args:
        images: the data set. A folder may have train/ and validation/, or validation/ alone, or be one part itself.
        names: the model's classes, if they are known.
        outputs: number of the model's outputs.

    Raises:
        AutogateError: it doesn't exist, it has no images, or its classes can't be numbered.
    """
    _check_counts(images)
    if not os.path.isdir(images.data):
        found = _named(images, images.val_split, False)
        return Labelled(found, _classes_of(found))
    found = _folder(images, images.val_split, alone=True)
    classes = set(found.reader.class_to_idx)
    if names is None or not classes <= set(names):
        names = _numbered(images, classes, names, outputs)
    numbers = {name: number for number, name in enumerate(names)}
    found = create_dataset("", root=found.reader.root, split=images.val_split, search_split=False, class_map=numbers)
    return Labelled(found, tuple(names))


def _numbered(images: Images, classes: set[str], names: Sequence[str] | None, outputs: int) -> list[str]:
    """The classes of a folder in the order of their numbers, where the model doesn't name them."""
    try:
        beside: Mapping[str, int] = _folder(images, images.train_split).reader.class_to_idx
    except AutogateError:  # there are no training images
        beside = {}
    if classes <= set(beside):
        return sorted(beside, key=beside.__getitem__)
    if names is None and len(classes) != outputs:
        raise AutogateError(
            f"it has images of {len(classes)} classes, the model has {outputs} outputs, and its file doesn't say which "
            "class is which.",
            where=f"--data {images.data}",
            remedy="Add a folder for each class that has no images, or give the folder that also has train/.",
        )
    return sorted(classes)


def _check_counts(images: Images) -> None:
    if not (images.batch_size >= 1 and images.workers >= 0):
        raise AutogateError("batch_size must be at least 1, and workers at least 0.", where="images")


def _splits(images: Images) -> tuple[str, str]:
    if images.train_split == images.val_split:
        raise AutogateError(
            f"the training and the validation part are both {images.val_split!r}.",
            where=f"--data {images.data}",
            remedy="Name two parts with --train-split and --val-split.",
        )
    return images.train_split, images.val_split


def _from_folder(images: Images) -> DataSets:
    train, val = (_folder(images, split) for split in _splits(images))
    names: Mapping[str, int] = train.reader.class_to_idx
    if len(names) < 2:
        raise AutogateError(
            f"all training images are in one class, {next(iter(names))!r}.",
            where=f"--data {images.data}",
            remedy="Put the images of each class into a folder of its own.",
        )
    unknown = sorted(set(val.reader.class_to_idx) - set(names))
    if unknown:
        raise AutogateError(
            f"class {unknown[0]!r} has validation images, but no training images.", where=f"--data {images.data}"
        )
    # timm numbers the classes of each part separately: a class without validation images would shift the others.
    val = create_dataset("", root=val.reader.root, split=images.val_split, search_split=False, class_map=dict(names))
    return DataSets(train, val, _classes_of(train))


def _folder(images: Images, split: str, alone: bool = False) -> Any:
    """One part of a folder; with `alone`, the folder itself if it has no parts."""
    where = f"--data {images.data}"
    try:
        found = create_dataset("", root=images.data, split=split)
    except RuntimeError as error:  # timm's message names the folder and the file suffixes it looks for
        raise AutogateError(
            f"{error}.", where=where, remedy="Put the images of each class into a folder of its own."
        ) from error
    root = getattr(found.reader, "root", None)
    is_whole = root is not None and Path(root).resolve() == Path(images.data).resolve()
    if is_whole and not (alone and not (Path(images.data) / images.train_split).is_dir()):
        there = ", ".join(sorted(entry.name for entry in Path(images.data).iterdir() if entry.is_dir())[:6])
        raise AutogateError(
            f"it has no folder {split!r} (its folders: {there}).",
            where=where,
            remedy="Put the images into train/CLASS/ and validation/CLASS/, or name the folders with --train-split "
            "and --val-split.",
        )
    return found


def _named(images: Images, split: str, training: bool) -> Any:
    """One part of a data set that has a name."""
    where, name, root = f"--data {images.data}", SHORT_NAMES.get(images.data, images.data), images.data_dir
    if name.partition("/")[0].lower() not in KINDS:
        raise AutogateError(
            "there is no such folder or data set.",
            where=where,
            remedy="Give a folder that has train/ and validation/, or a name: cifar10, cifar100, torch/..., tfds/..., "
            "hfds/..., wds/....",
        )
    if root is None and name.startswith("torch/"):
        raise AutogateError("this data set needs a folder.", where=where, remedy="Name the folder with --data-dir.")
    try:
        return create_dataset(
            name, root=root, split=split, is_training=training, download=images.download, batch_size=images.batch_size
        )
    except (RuntimeError, AssertionError, ImportError, NameError, ValueError, FileNotFoundError) as error:
        remedy = "" if images.download else "If the data set is not there yet, --data-download fetches it."
        raise AutogateError(f"{str(error).strip() or type(error).__name__}.", where=where, remedy=remedy) from error


def _classes_of(dataset: Any) -> tuple[str, ...] | None:
    for holder, attribute in ((dataset, "classes"), (getattr(dataset, "reader", None), "class_to_idx")):
        found = getattr(holder, attribute, None)
        if found:
            return tuple(map(str, sorted(found, key=found.__getitem__) if isinstance(found, Mapping) else found))
    return None


def loaders(data: DataSets, images: Images, config: Mapping[str, Any], world: World) -> Loaders:
    """Make loaders with timm's transforms.

    Args:
        data: the data sets, from `find_data`.
        images: how to transform and batch the images.
        config: "input_size", "mean", "std", "interpolation", "crop_pct" and "crop_mode", as in
            `timm.data.resolve_data_config`.
        world: the processes that share the images.

    Raises:
        AutogateError: there are fewer images than in one batch.
    """
    train, val = _train_loader(data, images, config, world), val_loader(data.val, images, config, world)
    if len(train) == 0:
        raise AutogateError(
            f"{len(data.train)} training images for {world.size} process(es) don't fill a batch of "
            f"{images.batch_size}.",
            where=f"--data {images.data}",
            remedy="Use a smaller --batch-size.",
        )
    share = None
    if world.size > 1 and not isinstance(data.val, IterableDataset):
        share = len(range(world.rank, len(data.val), world.size))
    return Loaders(train, val, share)


def _train_loader(data: DataSets, images: Images, config: Mapping[str, Any], world: World) -> Any:
    return create_loader(
        data.train,
        batch_size=images.batch_size,
        is_training=True,
        scale=images.scale,
        hflip=images.hflip,
        color_jitter=images.color_jitter,
        auto_augment=images.aa,
        interpolation=config["interpolation"],
        **_shared_options(images, config, world),
    )


def val_loader(part: Any, images: Images, config: Mapping[str, Any], world: World) -> Any:
    """A loader of a data set to evaluate on; see `loaders`."""
    return create_loader(
        part,
        batch_size=images.validation_batch_size or images.batch_size,
        interpolation=config["interpolation"],
        crop_pct=config["crop_pct"],
        crop_mode=config["crop_mode"],
        **_shared_options(images, config, world),
    )


def _shared_options(images: Images, config: Mapping[str, Any], world: World) -> dict[str, Any]:
    """Arguments of `timm.data.create_loader` that are the same for training and validation."""
    return {
        "input_size": config["input_size"],
        "mean": config["mean"],
        "std": config["std"],
        "num_workers": images.workers,
        "distributed": world.size > 1,
        "pin_memory": world.device.type == "cuda",
        "device": world.device,
        # Without worker processes, images are transformed in this process. They must not be a batch ahead, so that all
        # random numbers for a batch are drawn after the batch before it was trained.
        "use_prefetcher": world.device.type == "cuda" and images.workers > 0,
        "persistent_workers": False,  # they would keep their own random number states, which no checkpoint has
    }


def set_epoch(loader: Any, epoch: int) -> None:
    """Tell the sampler and the data set, which shuffle, the epoch."""
    for holder in (loader.sampler, loader.dataset):
        if hasattr(holder, "set_epoch"):
            holder.set_epoch(epoch)


@contextlib.contextmanager
def _signals_held() -> Iterator[None]:
    """Block SIGINT and SIGTERM within. Processes started within never get them.

    These signals are for the training process, which stops its workers itself.
    """
    if not hasattr(signal, "pthread_sigmask"):  # Windows sends no signal to a process group
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def on_device(loader: Iterable[Any], device: torch.device) -> Iterable[tuple[torch.Tensor, torch.Tensor]]:
    """A loader's batches, on the model's device."""
    with _signals_held():  # some loaders start their workers with the first batch
        batches = iter(loader)
        first = list(itertools.islice(batches, 1))
    for images, labels, *_ in itertools.chain(first, batches):
        yield images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
