"""DeepLabV3+ on CamVid: dense training, then training with gates from the trained network, then the slim one.

    python -m benchmarks.camvid --data FOLDER --out runs/camvid.json --epochs 15 --flops 0.5

FOLDER has CamVid as in SegNet's tutorial: images in `train` and `test`, labels of the same names in `trainannot` and
`testannot`, one number per pixel: 0 to 10 for the classes, 11 for pixels that don't count. Needs
segmentation_models_pytorch (`pip install -e ".[test]"`).
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from pathlib import Path

import numpy as np
import segmentation_models_pytorch as smp
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

import autogate

CLASSES, VOID = 11, 11
MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
BATCH, CROP, STRIDE = 8, (96, 128), 16


def load(folder: Path, split: str) -> tuple[Tensor, Tensor]:
    """Images (N, 3, H, W) float32 and labels (N, H, W) int64, cut to a multiple of the encoder's stride."""
    names = sorted(path.name for path in (folder / split).glob("*.png"))
    if not names:
        raise SystemExit(f"{folder / split} has no PNG images; see python -m benchmarks.camvid --help")
    images = np.stack([np.asarray(Image.open(folder / split / name).convert("RGB")) for name in names])
    labels = np.stack([np.asarray(Image.open(folder / f"{split}annot" / name)) for name in names])
    height, width = (side // STRIDE * STRIDE for side in labels.shape[1:])
    normalised = (torch.from_numpy(images[:, :height, :width]) / 255 - MEAN) / STD
    return normalised.permute(0, 3, 1, 2).contiguous(), torch.from_numpy(labels[:, :height, :width]).long()


def crops(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The same random crop of all images, mirrored with probability one half."""
    top, left = (int(torch.randint(whole - part + 1, ())) for whole, part in zip(labels.shape[1:], CROP, strict=True))
    window = (..., slice(top, top + CROP[0]), slice(left, left + CROP[1]))
    images, labels = images[window], labels[window]
    return (images.flip(-1), labels.flip(-1)) if torch.rand(()) < 0.5 else (images, labels)


def train(model: nn.Module, images: Tensor, labels: Tensor, epochs: int, peak: float) -> None:
    """A training loop that knows nothing of gates."""
    steps = epochs * (len(images) // BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, peak, max(1, steps), pct_start=0.1)
    model.train()
    for epoch in range(epochs):
        for index in torch.randperm(len(images)).split(BATCH):
            if len(index) < BATCH:
                continue
            inputs, wanted = crops(images[index], labels[index])
            optimizer.zero_grad()
            loss = F.cross_entropy(model(inputs), wanted, ignore_index=VOID)
            loss.backward()
            optimizer.step()
            schedule.step()
        print(f"epoch {epoch + 1} of {epochs}: loss {loss.item():.3f}", flush=True)
    model.eval()


@torch.no_grad()
def outputs(model: nn.Module, images: Tensor) -> Tensor:
    return torch.cat([model(batch) for batch in images.split(BATCH)])


def scores(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """Pixel accuracy, and mean intersection over union of the classes that occur, in percent."""
    seen = labels != VOID
    told, wanted = logits.argmax(1)[seen], labels[seen]
    table = torch.bincount(wanted * CLASSES + told, minlength=CLASSES**2).view(CLASSES, CLASSES).double()
    hit, union = table.diagonal(), table.sum(0) + table.sum(1) - table.diagonal()
    return {
        "pixels": 100 * float(hit.sum() / table.sum()),
        "miou": 100 * float((hit / union)[table.sum(1) > 0].mean()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=15, help="epochs of dense training, and again with gates")
    parser.add_argument("--flops", type=float, default=0.5)
    parser.add_argument("--encoder", default="resnet18")
    parser.add_argument("--images", type=int, help="number of images to train and test on")
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    images, labels = (part[: args.images] for part in load(args.data, "train"))
    test_images, test_labels = (part[: args.images] for part in load(args.data, "test"))
    begun = time.perf_counter()

    model = smp.DeepLabV3Plus(args.encoder, encoder_weights=None, classes=CLASSES)
    train(model, images, labels, args.epochs, 1e-3)
    dense = scores(outputs(model, test_images), test_labels)

    steps = args.epochs * (len(images) // BATCH)
    model = autogate.prepare(model, images[:2], flops=args.flops, steps=steps)
    train(model, images, labels, args.epochs, 5e-4)
    left = autogate.summary(model)
    before = outputs(model, test_images)
    slim = autogate.finalize(copy.deepcopy(model)).eval()
    after = outputs(slim, test_images)

    result = {
        "dense": dense,
        "gated": scores(before, test_labels),
        "slim": scores(after, test_labels),
        "flops_left": left.flops / left.all_flops,
        "params_left": left.params / left.all_params,
        "reach": left.reach,
        "error": float((before - after).norm() / before.norm()),
        "pixels_told_differently": int((before.argmax(1) != after.argmax(1)).sum()),
        "pixels": before[:, 0].numel(),
        "epochs": args.epochs,
        "minutes": (time.perf_counter() - begun) / 60,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1))
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
