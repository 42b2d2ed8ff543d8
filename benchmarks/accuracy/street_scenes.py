"""CamVid: street scenes with a class for each pixel, and a segmentation network with a trained encoder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from benchmarks.accuracy.data import Data, packed
from benchmarks.accuracy.lite0 import load_weights
from benchmarks.accuracy.setting import Sources

CLASSES, VOID = 11, 11
CROP, STRIDE = (96, 128), 32


def network(sources: Sources) -> nn.Module:
    """An FPN on EfficientNet-Lite0, with ImageNet's weights in the encoder (segmentation_models_pytorch)."""
    import segmentation_models_pytorch as smp

    model = smp.FPN("tu-tf_efficientnet_lite0", encoder_weights=None, classes=CLASSES)
    load_weights(model.encoder.model, sources.weights)
    return model


def read(folder: Path, split: str, stride: int = STRIDE) -> Data:
    """Images (N, 3, H, W) uint8 and labels (N, H, W) int64, cut to a multiple of the encoder's stride.

    From `train.npz` and `test.npz` (see `packed`), or as in SegNet's tutorial: images in `train` and `test`, labels of
    the same names in `trainannot` and `testannot`.
    """
    found = packed(folder, split)
    if found is None:
        names = sorted(path.name for path in (folder / split).glob("*.png"))
        if not names:
            raise SystemExit(f"{folder} has neither {split}.npz nor PNG images in {split}.")
        images = np.stack([np.asarray(Image.open(folder / split / name).convert("RGB")) for name in names])
        labels = np.stack([np.asarray(Image.open(folder / f"{split}annot" / name)) for name in names])
        found = Data(torch.from_numpy(images).permute(0, 3, 1, 2), torch.from_numpy(labels).long())
    height, width = (side // stride * stride for side in found.labels.shape[1:])
    return Data(found.inputs[..., :height, :width].contiguous(), found.labels[:, :height, :width].contiguous())


def load(sources: Sources, split: str) -> Data:
    return read(sources.data, split)


def ready(images: Tensor) -> Tensor:
    return images.float() / 127.5 - 1


def crops(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The same random crop of all images, mirrored with probability one half."""
    top, left = (int(torch.randint(whole - part + 1, ())) for whole, part in zip(labels.shape[1:], CROP, strict=True))
    window = (..., slice(top, top + CROP[0]), slice(left, left + CROP[1]))
    images, labels = images[window], labels[window]
    return (images.flip(-1), labels.flip(-1)) if torch.rand(()) < 0.5 else (images, labels)


def loss(outputs: Tensor, labels: Tensor) -> Tensor:
    """Mean over the pixels that count."""
    return F.cross_entropy(outputs, labels, ignore_index=VOID)


def confusion(told: Tensor, labels: Tensor) -> Tensor:
    """Pixels by true class and told class, shape (classes, classes); float64."""
    seen = labels != VOID
    pairs = labels[seen] * CLASSES + told[seen]
    return torch.bincount(pairs, minlength=CLASSES**2).view(CLASSES, CLASSES).double()


def mean_iou(told: Tensor, labels: Tensor) -> float:
    """Mean intersection over union of the classes that occur, in percent."""
    table = confusion(told, labels)
    hit, union = table.diagonal(), table.sum(0) + table.sum(1) - table.diagonal()
    return 100 * float((hit / union)[table.sum(1) > 0].mean())
