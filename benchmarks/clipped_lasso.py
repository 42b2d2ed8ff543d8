"""The clipped group Lasso beside GDP, at equal epochs from the same trained network.

    python -m benchmarks.clipped_lasso digits
    python -m benchmarks.clipped_lasso cifar10 --data FOLDER --out runs/clipped_lasso --epochs 30

`digits` prints the table of docs/methods.md. `cifar10` trains a ResNet-20 (FOLDER as in
`benchmarks.accuracy.data.load`), writes a JSON file a run, prints a table, and draws norms.svg: how far the norms of
live classes are from their group's mean (Yang et al., "Non-uniform DNN Structured Subnets Sampling for Dynamic
Inference", figure 10). A run whose file exists is skipped, so an interrupted benchmark can be continued. Needs
matplotlib.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import math
import statistics
from dataclasses import replace
from pathlib import Path

import timm
import torch
from torch import Tensor, nn

import autogate
from autogate.digits import load as load_digits
from autogate.methods import Method
from benchmarks.accuracy.blocks import dense_network
from benchmarks.accuracy.data import Data, load, normalise
from benchmarks.accuracy.recipe import fit, predict
from benchmarks.accuracy.setting import Recipe, Setting, accuracy
from benchmarks.accuracy.settings import CIFAR
from benchmarks.cifar10 import once

METHODS: dict[str, Method] = {
    "GDP": autogate.GDP(),
    **{f"a = {a:g}": autogate.ClippedLasso(a=a) for a in (0.3, 0.75, 1.5, math.inf)},
}
SHARES = (0.5, 0.22, 0.05)


def fit_digits(model: nn.Module, images: Tensor, labels: Tensor, lr: float, seed: int, steps: int) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr, momentum=0.9, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(seed)
    model.train()
    for _step in range(steps):
        chosen = torch.randint(len(images), (32,), generator=generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images[chosen]), labels[chosen]).backward()
        optimizer.step()
        schedule.step()


def digits(steps: int = 150) -> None:
    """Print accuracy in % by method and share of FLOPs."""
    train, test = load_digits()

    def right(model: nn.Module) -> float:
        with torch.no_grad():
            return 100 * float((model.eval()(test.images).argmax(1) == test.labels).float().mean())

    torch.manual_seed(0)
    dense = timm.create_model("test_resnet", num_classes=10, in_chans=1)
    fit_digits(dense, train.images, train.labels, 0.05, 0, steps)
    print(f"dense: {right(dense):.1f}")
    for flops in SHARES:
        for name, method in METHODS.items():
            model = autogate.prepare(
                copy.deepcopy(dense), train.images[:2], flops=flops, steps=steps, method=method
            )  # fmt: skip
            fit_digits(model, train.images, train.labels, 0.02, 1, steps)
            share = autogate.gates(model).shares()["FLOPs"]
            print(f"{flops} {name}: {right(model):.1f}, {share:.3f} of the FLOPs left", flush=True)


def relative_norms(model: nn.Module) -> list[float]:
    """Norms of live classes, over all weights that they have, relative to the mean of their group."""
    bank = autogate.gates(model)
    squares = torch.zeros(bank.channel_map.size)
    for name, weight in model.named_parameters():
        for dim in range(weight.ndim):
            classes = bank.channel_map.classes.get((name, dim))  # type: ignore[call-overload]
            if classes is not None:
                own = weight.detach().movedim(dim, 0).flatten(1).square().sum(1) if weight.ndim > 1 else weight**2
                live = classes >= 0
                squares.index_add_(0, classes[live].cpu(), own.detach()[live].cpu().float())
    norms, found = squares.sqrt(), []
    for group in bank.learner.groups:
        chosen = torch.tensor(group.classes)[bank.live.cpu()[list(group.classes)]]
        found += (norms[chosen] / norms[chosen].mean()).tolist()
    return found


def gated_run(dense: nn.Module, train: Data, test: Data, setting: Setting, flops: float, method: Method) -> dict:
    """Train with gates from the trained dense network: what is left, accuracy, and the norms of live classes."""
    torch.manual_seed(1)
    recipe = setting.recipe
    model = autogate.prepare(
        copy.deepcopy(dense), normalise(train.inputs[:2]), flops=flops, shortcuts="conv",
        steps=recipe.steps(train, recipe.epochs), method=method,
    )  # fmt: skip
    fit(model, train, setting, recipe.epochs, recipe.peak / 2)
    left, norms = autogate.gates(model).shares()["FLOPs"], relative_norms(model)
    slim = autogate.finalize(model, warn=False)
    return {"left": left, "accuracy": accuracy(predict(slim, test.inputs, setting), test.labels), "norms": norms}


def cifar10(train: Data, test: Data, out: Path, setting: Setting, flops: tuple[float, ...]) -> None:
    """Train with each method, print a table and draw norms.svg."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    train, test = train.to(device), test.to(device)
    out.mkdir(parents=True, exist_ok=True)
    dense, score, _ = dense_network("resnet20", 0, setting, train, test, out)
    print(f"dense: {score:.2f} %", flush=True)
    results = []
    for share, (name, method) in itertools.product(flops, METHODS.items()):
        found = once(
            out / f"{name.replace(' ', '')}_{share}.json",
            lambda share=share, method=method: gated_run(dense, train, test, setting, share, method),
        )
        results.append({"flops": share, "method": name} | found)
        spread = statistics.pstdev(found["norms"])
        right, left = found["accuracy"], found["left"]
        print(f"{share} {name}: {right:.2f} %, {left:.3f} of the FLOPs left, spread of norms {spread:.2f}", flush=True)
    draw(results, out / "norms.svg")


def draw(results: list[dict], path: Path) -> None:
    """A histogram of relative norms for each method, one panel a share."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shares = sorted({result["flops"] for result in results}, reverse=True)
    figure, axes = plt.subplots(len(shares), 1, figsize=(7, 2.6 * len(shares)), squeeze=False, sharex=True)
    for axis, share in zip(axes[:, 0], shares, strict=True):
        for result in (result for result in results if result["flops"] == share):
            label = f"{result['method']}: {result['accuracy']:.1f} %"
            axis.hist(result["norms"], bins=40, range=(0, 3), histtype="step", density=True, label=label)
        axis.set_title(f"FLOPs left: {share}", fontsize=10)
        axis.legend(fontsize=8)
    axes[-1, 0].set_xlabel("norm of a class, relative to the mean of its group")
    figure.tight_layout()
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("digits", "cifar10"))
    parser.add_argument("--data", type=Path)
    parser.add_argument("--out", type=Path, default=Path("runs/clipped_lasso"))
    parser.add_argument("--epochs", type=int, default=30, help="epochs of each method")
    parser.add_argument("--dense-epochs", type=int, help="epochs of dense training before; as many if not given")
    parser.add_argument("--images", type=int, help="training images; all if not given")
    parser.add_argument("--flops", type=float, nargs="*", default=SHARES)
    args = parser.parse_args()
    if args.what == "digits":
        digits()
    elif args.data is None:
        parser.error("cifar10 needs --data")
    else:
        setting = replace(CIFAR["resnet20"], recipe=Recipe(args.epochs, args.dense_epochs))
        train = load(args.data, "train").some(args.images)
        cifar10(train, load(args.data, "test"), args.out, setting, tuple(args.flops))


if __name__ == "__main__":
    main()
