"""The images of a training run: what is found, what is refused, and which processes get signals."""

from __future__ import annotations

import dataclasses
import pickle
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

import autogate
from autogate.training import Images, Network, start
from autogate.training.data import find_data, find_labelled, on_device
from tests.autogate.conftest import CLASSES, paint
from tests.autogate.training.runs import recipe


def test_a_class_without_validation_images_shifts_no_label(tmp_path: Path):
    folder = paint(tmp_path / "data", {"train": 2, "validation": 2})
    for file in (folder / "validation" / "blue").iterdir():
        file.unlink()
    found = find_data(Images(str(folder)))
    names = dict(enumerate(CLASSES))
    assert {names[label] for _, label in (found.val[index] for index in range(len(found.val)))} == {"green", "red"}
    assert found.num_classes == 3


def test_a_folder_that_is_one_part_has_its_classes_numbered(tmp_path: Path):
    def labels(folder: Path, names: tuple[str, ...] | None, outputs: int) -> tuple[tuple[str, ...] | None, list[int]]:
        found = find_labelled(Images(str(folder)), names, outputs)
        return found.class_names, [label for _, label in (found.images[at] for at in range(len(found.images)))]

    data = paint(tmp_path / "data", {"validation": 1, "train": 1})
    alone = data / "validation"
    shutil.rmtree(alone / "blue")
    by_name = (("red", "blue", "green"), [2, 0])
    assert labels(alone, *by_name[:1], 3) == labels(data, *by_name[:1], 3) == by_name  # images of green, then of red
    assert labels(data, None, 3) == (CLASSES, [1, 2])
    assert labels(alone, None, 2) == (("green", "red"), [0, 1])
    with pytest.raises(autogate.AutogateError, match=r"images of 2 classes, .* 3 outputs, .* which class is which"):
        labels(alone, None, 3)
    shutil.rmtree(alone)
    with pytest.raises(autogate.AutogateError, match="it has no folder 'validation'"):
        labels(data, CLASSES, 3)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"data": "nowhere"}, "no such folder.*cifar10"),
        ({"train_split": "practice"}, "no folder 'practice'.*--train-split"),
        ({"val_split": "train"}, "are both 'train'.*--val-split"),
        ({"data": "torch/cifar10"}, "needs a folder.*--data-dir"),
        ({"data": "torch/cifar10", "data_dir": "."}, "--data-download"),
        ({"data": "torch/cifar11", "data_dir": "."}, "Unknown torchvision dataset"),
        ({"batch_size": 0}, "batch_size"),
    ],
)
def test_data_that_is_not_there_is_told(pictures: Path, change: dict[str, Any], told: str):
    images = dataclasses.replace(Images(str(pictures)), **change)
    with pytest.raises(autogate.AutogateError, match=told):
        find_data(images)


def test_folders_of_the_wrong_kind_are_told(pictures: Path, tmp_path: Path):
    (tmp_path / "empty" / "train").mkdir(parents=True)
    with pytest.raises(autogate.AutogateError, match=r"Found 0 images.*images of each class into a folder"):
        find_data(Images(str(tmp_path / "empty")))
    folder = paint(tmp_path / "more", {"train": 1, "validation": 1})
    (folder / "train" / "red").rename(folder / "train" / "yellow")
    with pytest.raises(autogate.AutogateError, match="class 'red' has validation images, but no training"):
        find_data(Images(str(folder)))
    with pytest.raises(autogate.AutogateError, match=r"24 training images .* don't fill a batch of 25"):
        start(recipe(pictures, images=Images(str(pictures), batch_size=25, workers=0)), tmp_path / "run")
    with pytest.raises(autogate.AutogateError, match="2 outputs, but the data has 3 classes"):
        start(recipe(pictures, network=Network("test_resnet", num_classes=2, img_size=32)), tmp_path / "run")


def test_cifar_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import hashlib

    from torchvision.datasets import CIFAR10

    base = tmp_path / CIFAR10.base_folder
    base.mkdir()
    batch = pickle.dumps(
        {"data": torch.arange(4 * 3072).remainder(256).byte().view(4, -1).numpy(), "labels": [0, 1, 2, 9]}
    )
    meta = pickle.dumps({"label_names": [str(index) for index in range(10)]})
    for name, content in (("one", batch), ("meta", meta)):
        (base / name).write_bytes(content)
    sums = {name: hashlib.md5((base / name).read_bytes()).hexdigest() for name in ("one", "meta")}
    for attribute in ("train_list", "test_list"):
        monkeypatch.setattr(CIFAR10, attribute, [["one", sums["one"]]])
    monkeypatch.setattr(CIFAR10, "meta", {"filename": "meta", "key": "label_names", "md5": sums["meta"]})
    found = find_data(Images("cifar10", data_dir=str(tmp_path)))
    assert (len(found.train), len(found.val), found.num_classes) == (4, 4, 10) and found.train[3][1] == 9


class TellsOfSignals(torch.utils.data.Dataset):
    """Its images say whether a signal to stop can reach the process that loads them."""

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, [])
        return torch.tensor([float(number in blocked) for number in (signal.SIGINT, signal.SIGTERM)]), 0


@pytest.mark.parametrize("workers", [0, 1])
def test_signals_to_stop_are_for_the_process_that_trains(workers: int):
    loader = torch.utils.data.DataLoader(TellsOfSignals(), num_workers=workers)
    batches = [images for images, _ in on_device(loader, torch.device("cpu"))]
    assert all(batches[-1].flatten().bool()) == (workers == 1)
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, []) & {signal.SIGINT, signal.SIGTERM}
