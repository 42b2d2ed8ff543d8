"""Accuracy of GDP on CIFAR-10: dense training, then gates from that trained net at several FLOPs budgets.

    python benchmarks/cifar10.py --data FOLDER --out runs/cifar10 --epochs 12 --flops 0.5 0.3
    python benchmarks/cifar10.py --data FOLDER --out runs/cifar10 --flops 0.5 0.25 --shortcuts shared conv
    python benchmarks/cifar10_channels.py --runs runs/cifar10 --out docs/figures/shortcuts.svg
    python benchmarks/cifar10_polarization.py --run runs/cifar10/shared_0.5_0.json --out docs/figures/polarization.svg

FOLDER holds torchvision's CIFAR-10, or `train.npz` and `test.npz` with arrays `images`, (N, 32, 32, 3) uint8,
and `labels`, (N,). Each run leaves one JSON file in the output folder; a run whose file stands there is not
run again, so that a broken-off benchmark goes on where it was.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import autogate

BINS = 20
"""Bins of the histograms of gates, over [0, 1]."""

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut, a 1x1 projection where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Identity()
        if stride > 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + self.shortcut(x))


class CifarResNet(nn.Module):
    """ResNet for CIFAR of 6 n + 2 layers (He et al., Deep Residual Learning, section 4.2)."""

    def __init__(self, n: int = 3):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        widths = [16] * n + [32] * n + [64] * n
        inputs = [16, *widths[:-1]]
        self.blocks = nn.Sequential(*(Block(a, b, 1 if a == b else 2) for a, b in zip(inputs, widths, strict=True)))
        self.fc = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.blocks(self.stem(x)).mean((2, 3)))


def load(folder: Path, split: str) -> tuple[Tensor, Tensor]:
    """Images (N, 3, 32, 32) uint8 and labels (N,) int64."""
    packed = folder / f"{split}.npz"
    if packed.exists():
        with np.load(packed) as arrays:
            images, labels = arrays["images"], arrays["labels"]
    else:
        from torchvision.datasets import CIFAR10

        try:
            data = CIFAR10(str(folder), train=split == "train")
        except RuntimeError as error:
            sys.exit(f"{folder} holds neither {split}.npz nor torchvision's CIFAR-10: {error}")
        images, labels = data.data, np.asarray(data.targets)
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(labels)


def normalise(images: Tensor) -> Tensor:
    mean, std = (torch.tensor(v, device=images.device).view(1, 3, 1, 1) * 255 for v in (MEAN, STD))
    return ((images.float() - mean) / std).contiguous(memory_format=torch.channels_last)


def augment(images: Tensor) -> Tensor:
    """Flips and shifts by up to 4 pixels, the whole batch at once."""
    count, device = len(images), images.device
    flip = torch.rand(count, device=device) < 0.5
    images = torch.where(flip.view(-1, 1, 1, 1), images.flip(3), images)
    padded = F.pad(images, (4, 4, 4, 4))
    rows = torch.randint(9, (count, 1), device=device) + torch.arange(32, device=device)
    columns = torch.randint(9, (count, 1), device=device) + torch.arange(32, device=device)
    at = torch.arange(count, device=device).view(-1, 1, 1, 1), torch.arange(3, device=device).view(1, -1, 1, 1)
    return padded[at[0], at[1], rows.view(count, 1, 32, 1), columns.view(count, 1, 1, 32)]


def has_bfloat16(device: torch.device) -> bool:
    """Whether bfloat16 is the faster way there: on a processor that has to emulate it, it takes twice the time."""
    return device.type == "cuda" or torch.cpu._is_avx512_bf16_supported()


def train(model: nn.Module, data: tuple[Tensor, Tensor], epochs: int, peak: float, batch: int, report) -> None:
    """A plain training loop: SGD with momentum, one warm-up epoch, cosine decay, bfloat16 where it is faster."""
    images, labels = data
    steps = epochs * (len(images) // batch)
    optimizer = torch.optim.SGD(model.parameters(), lr=peak, momentum=0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, peak, steps, pct_start=1 / epochs, cycle_momentum=False)
    for epoch in range(epochs):
        model.train()
        for index in torch.randperm(len(images), device=images.device).split(batch):
            if len(index) < batch:
                continue
            with torch.autocast(images.device.type, torch.bfloat16, enabled=has_bfloat16(images.device)):
                loss = F.cross_entropy(model(normalise(augment(images[index]))), labels[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        report(epoch, loss.item())


@torch.no_grad()
def predict(model: nn.Module, images: Tensor, batch: int = 1000) -> Tensor:
    """Predicted classes, shape (N,), in eval mode and float32."""
    model.eval()
    return torch.cat([model(normalise(part)).argmax(1) for part in images.split(batch)])


def accuracy(predicted: Tensor, labels: Tensor) -> float:
    return float((predicted == labels).float().mean()) * 100


def gated_run(dense: nn.Module, train_data, test_data, flops: float, shortcuts: str, args) -> dict:
    """Gates from the trained dense net. Each point of the curve has the accuracy of the gated net, and of the same
    net finalized at that epoch."""
    model = copy.deepcopy(dense)
    steps = args.epochs * (len(train_data[0]) // args.batch)
    example = normalise(train_data[0][:2])
    model = autogate.prepare(model, example, flops=flops, steps=steps, shortcuts=shortcuts)
    curve = []

    def report(epoch: int, loss: float) -> None:
        bank = autogate.gates(model)
        point = {
            "epoch": epoch + 1,
            "loss": loss,
            "flops_left": bank.shares()["FLOPs"],
            "accuracy_gated": accuracy(predict(model, test_data[0]), test_data[1]),
            "accuracy_slim": accuracy(
                predict(autogate.finalize(copy.deepcopy(model), warn=False), test_data[0]), test_data[1]
            ),
            "gates": torch.histc(bank.gates().cpu(), BINS, 0, 1).int().tolist(),
        }
        curve.append(point)
        print(
            f"  epoch {epoch + 1}: loss {loss:.3f}, FLOPs left {point['flops_left']:.4f}, "
            f"test {point['accuracy_gated']:.2f} %, finalized {point['accuracy_slim']:.2f} %",
            flush=True,
        )

    train(model, train_data, args.epochs, args.peak / 2, args.batch, report)
    bank = autogate.gates(model)
    between = int(((bank.gates() > 0.01) & (bank.gates() < 0.5)).sum())
    summary = autogate.summary(model)
    before = predict(model, test_data[0])
    after = predict(autogate.finalize(model), test_data[0])
    return {
        "flops_target": flops,
        "shortcuts": shortcuts,
        "channels": [(layer.module, layer.outputs, layer.all_outputs) for layer in summary.layers],
        "flops_left": summary.flops / summary.all_flops,
        "params_left": summary.params / summary.all_params,
        "gates": bank.channel_map.size,
        "gates_between_0.01_and_0.5": between,
        "accuracy_gated": accuracy(before, test_data[1]),
        "accuracy_slim": accuracy(after, test_data[1]),
        "predictions_that_differ": int((before != after).sum()),
        "curve": curve,
    }


def once(path: Path, run) -> dict:
    """The result in `path`, run now if it isn't there."""
    if not path.exists():
        started = time.time()
        result = run() | {"seconds": None}
        result["seconds"] = round(time.time() - started)
        path.write_text(json.dumps(result, indent=1))
    return json.loads(path.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("runs/cifar10"))
    parser.add_argument("--depth", type=int, default=20, help="layers of the ResNet, 6 n + 2")
    parser.add_argument("--epochs", type=int, default=12, help="dense, and gated, epochs each")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--peak", type=float, default=0.1, help="peak learning rate; half of it with gates")
    parser.add_argument("--flops", type=float, nargs="*", default=[0.5, 0.3])
    parser.add_argument("--shortcuts", nargs="*", default=["shared"], choices=["shared", "conv"])
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    args.out.mkdir(parents=True, exist_ok=True)
    train_data = tuple(tensor.to(device) for tensor in load(args.data, "train"))
    test_data = tuple(tensor.to(device) for tensor in load(args.data, "test"))
    torch.manual_seed(args.seed)
    dense = CifarResNet((args.depth - 2) // 6).to(device, memory_format=torch.channels_last)
    weights = args.out / f"dense_{args.seed}.pt"

    def dense_run() -> dict:
        train(
            dense, train_data, args.epochs, args.peak, args.batch,
            lambda epoch, loss: print(f"  dense epoch {epoch + 1}: loss {loss:.3f}", flush=True),
        )  # fmt: skip
        torch.save(dense.state_dict(), weights)
        return {"accuracy": accuracy(predict(dense, test_data[0]), test_data[1])}

    result = once(args.out / f"dense_{args.seed}.json", dense_run)
    print(f"dense: {result['accuracy']:.2f} %")
    dense.load_state_dict(torch.load(weights, weights_only=True))
    for flops, shortcuts in itertools.product(args.flops, args.shortcuts):
        torch.manual_seed(args.seed + 1)
        result = once(
            args.out / f"{shortcuts}_{flops}_{args.seed}.json",
            lambda flops=flops, shortcuts=shortcuts: gated_run(dense, train_data, test_data, flops, shortcuts, args),
        )
        print(
            f"FLOPs {flops}, shortcuts {shortcuts}: {result['flops_left']:.4f} left, "
            f"gated {result['accuracy_gated']:.2f} %, slim {result['accuracy_slim']:.2f} %, "
            f"{result['predictions_that_differ']} predictions differ"
        )


if __name__ == "__main__":
    main()
