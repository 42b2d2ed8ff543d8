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

import segmentation_models_pytorch as smp
import torch
from torch import Tensor, nn

import autogate
from benchmarks.accuracy.street_scenes import CLASSES, confusion, crops, mean_iou, read
from benchmarks.accuracy.street_scenes import loss as pixel_loss

MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
BATCH, STRIDE = 8, 16


def load(folder: Path, split: str) -> tuple[Tensor, Tensor]:
    """Images (N, 3, H, W) float32, normalised, and labels (N, H, W) int64."""
    images, labels = read(folder, split, STRIDE)
    normalised = (images.permute(0, 2, 3, 1) / 255 - MEAN) / STD
    return normalised.permute(0, 3, 1, 2).contiguous(), labels


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
            loss = pixel_loss(model(inputs), wanted)
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
    told = logits.argmax(1)
    table = confusion(told, labels)
    return {"pixels": 100 * float(table.diagonal().sum() / table.sum()), "miou": mean_iou(told, labels)}


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
