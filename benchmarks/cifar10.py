"""Gated runs on CIFAR-10 over time, at several FLOPs budgets and with both kinds of shortcuts.

    python -m benchmarks.cifar10 --data FOLDER --out runs/cifar10 --epochs 12 --flops 0.5 0.3
    python -m benchmarks.cifar10 --data FOLDER --out runs/cifar10 --flops 0.5 0.25 --shortcuts shared conv
    python -m benchmarks.cifar10_channels --runs runs/cifar10 --out docs/figures/shortcuts.svg
    python -m benchmarks.cifar10_polarization --run runs/cifar10/shared_0.5_0.json --out docs/figures/polarization.svg

FOLDER has torchvision's CIFAR-10, or `train.npz` and `test.npz` with arrays `images`, (N, 32, 32, 3) uint8, and
`labels`, (N,). Each run writes one JSON file into the output folder. A run whose file exists is skipped, so an
interrupted benchmark can be continued.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from torch import nn

import autogate
from benchmarks.accuracy.blocks import dense_network
from benchmarks.accuracy.data import Data, load, normalise
from benchmarks.accuracy.models import MODELS
from benchmarks.accuracy.recipe import fit, predict
from benchmarks.accuracy.setting import Recipe, Setting, accuracy
from benchmarks.accuracy.settings import CIFAR

BINS = 20
"""Bins of the histograms of gates, over [0, 1]."""


def once(path: Path, run: Callable[[], dict]) -> dict:
    """The result in `path`; if there is none, run it now."""
    if not path.exists():
        started = time.time()
        result = run()
        path.write_text(json.dumps(result | {"seconds": round(time.time() - started)}, indent=1))
    return json.loads(path.read_text())


def gated_run(
    dense: nn.Module, train: Data, test: Data, setting: Setting, flops: float, shortcuts: Literal["shared", "conv"]
) -> dict:
    """Train with gates from the trained dense network.

    Each point of the curve has the accuracy of the gated network, and of the same network finalized at that epoch.
    """
    model, recipe = copy.deepcopy(dense), setting.recipe
    steps = recipe.steps(train, recipe.epochs)
    model = autogate.prepare(model, normalise(train.inputs[:2]), flops=flops, steps=steps, shortcuts=shortcuts)
    curve = []

    def report(epoch: int, loss: float) -> None:
        bank = autogate.gates(model)
        point = {
            "epoch": epoch,
            "loss": loss,
            "flops_left": bank.shares()["FLOPs"],
            "accuracy_gated": accuracy(predict(model, test.inputs, setting), test.labels),
            "accuracy_slim": accuracy(
                predict(autogate.finalize(copy.deepcopy(model), warn=False), test.inputs, setting), test.labels
            ),
            "gates": torch.histc(bank.gates().cpu(), BINS, 0, 1).int().tolist(),
        }
        curve.append(point)
        print(
            f"  epoch {epoch}: loss {loss:.3f}, FLOPs left {point['flops_left']:.4f}, "
            f"test {point['accuracy_gated']:.2f} %, finalized {point['accuracy_slim']:.2f} %",
            flush=True,
        )

    fit(model, train, setting, recipe.epochs, recipe.peak / 2, report)
    bank = autogate.gates(model)
    between = int(((bank.gates() > 0.01) & (bank.gates() < 0.5)).sum())
    summary = autogate.summary(model)
    before = predict(model, test.inputs, setting)
    after = predict(autogate.finalize(model), test.inputs, setting)
    return {
        "flops_target": flops,
        "shortcuts": shortcuts,
        "channels": [(layer.module, layer.outputs, layer.all_outputs) for layer in summary.layers],
        "flops_left": summary.flops / summary.all_flops,
        "params_left": summary.params / summary.all_params,
        "gates": bank.channel_map.size,
        "gates_between_0.01_and_0.5": between,
        "accuracy_gated": accuracy(before, test.labels),
        "accuracy_slim": accuracy(after, test.labels),
        "predictions_that_differ": int((before != after).sum()),
        "curve": curve,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("runs/cifar10"))
    parser.add_argument("--model", default="resnet20", choices=list(MODELS))
    parser.add_argument("--epochs", type=int, default=12, help="epochs of dense training, and again with gates")
    parser.add_argument("--peak", type=float, default=0.1, help="peak learning rate; half of it with gates")
    parser.add_argument("--flops", type=float, nargs="*", default=[0.5, 0.3])
    parser.add_argument("--shortcuts", nargs="*", default=["shared"], choices=["shared", "conv"])
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    args.out.mkdir(parents=True, exist_ok=True)
    train, test = (load(args.data, split).to(device) for split in ("train", "test"))
    setting = replace(CIFAR[args.model], recipe=Recipe(args.epochs, peak=args.peak))
    dense = dense_network(args.model, args.seed, setting, train, test, args.out).model
    for flops, shortcuts in itertools.product(args.flops, args.shortcuts):
        torch.manual_seed(args.seed + 1)
        result = once(
            args.out / f"{shortcuts}_{flops}_{args.seed}.json",
            lambda flops=flops, shortcuts=shortcuts: gated_run(dense, train, test, setting, flops, shortcuts),
        )
        print(
            f"FLOPs {flops}, shortcuts {shortcuts}: {result['flops_left']:.4f} left, "
            f"gated {result['accuracy_gated']:.2f} %, slim {result['accuracy_slim']:.2f} %, "
            f"{result['predictions_that_differ']} predictions differ"
        )


if __name__ == "__main__":
    main()
