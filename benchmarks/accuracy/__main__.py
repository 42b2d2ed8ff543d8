"""Accuracy at equal FLOPs and equal epochs: autogate beside Torch-Pruning's methods and dense training.

    python -m benchmarks.accuracy run --data FOLDER --out runs/accuracy
    python -m benchmarks.accuracy run --data FOLDER --out runs/accuracy --models resnet56 --epochs 200 --compiled
    python -m benchmarks.accuracy table --out runs/accuracy --docs docs/benchmarks

FOLDER holds torchvision's CIFAR-10, or `train.npz` and `test.npz` (see `data.load`). All methods start from the same
trained network (one a seed) and spend the same epochs. Each run leaves one JSON file; one whose file stands there isn't
run again, so that a broken-off benchmark goes on where it was.

Settings are chosen with `--held-out`: a fifth of the training images is kept from all training, and accuracy is read
off it. `--set sensitivity.DAMPING=0.3` runs with another value of a constant of autogate's, `--schedule keep=0.5` with
another schedule.

Torch-Pruning's methods need `pip install torch-pruning`.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import importlib
import itertools
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

import autogate.api
from autogate.schedule import Schedule
from benchmarks.accuracy.data import Data, held_out, load, normalise
from benchmarks.accuracy.methods import METHODS, Task, count_flops
from benchmarks.accuracy.models import MODELS
from benchmarks.accuracy.recipe import Recipe, accuracy, fit, loss, predict
from benchmarks.accuracy.runs import dense_model, once
from benchmarks.accuracy.table import write


def slim_run(
    dense: torch.nn.Module, method: str, flops: float, seed: int, train: Data, test: Data, recipe: Recipe
) -> dict:
    """One method on one trained network: its accuracy, and what of the FLOPs and parameters is left."""
    model = copy.deepcopy(dense)
    example = normalise(train.images[:2])
    whole, params = count_flops(model, example), sum(parameter.numel() for parameter in model.parameters())

    def report(epoch: int, loss: float) -> None:
        print(f"  {method} {flops}, seed {seed}, epoch {epoch}: loss {loss:.3f}", flush=True)

    def training(model: torch.nn.Module, epochs: int, **settings: Any) -> None:
        fit(model, train, recipe, epochs, recipe.peak / 2, report, **settings)

    torch.manual_seed(1000 + seed)
    slim = METHODS[method](model, Task(flops, recipe.epochs, recipe.steps(train, recipe.epochs), example, training))
    return {
        "method": method,
        "flops_target": flops,
        "seed": seed,
        "epochs": recipe.epochs,
        "accuracy": accuracy(predict(slim, test.images), test.labels),
        "loss": loss(slim, test),
        "flops_left": count_flops(slim, example) / whole,
        "params_left": sum(parameter.numel() for parameter in slim.parameters()) / params,
    }


def set_constant(assignment: str) -> None:
    """Gives a constant of an autogate module another value: `sensitivity.DAMPING=0.3`."""
    place, _, value = assignment.partition("=")
    module, _, name = place.rpartition(".")
    home = importlib.import_module(f"autogate.{module}")
    if not hasattr(home, name):
        raise SystemExit(f"autogate.{module} has no {name}.")
    setattr(home, name, type(getattr(home, name))(value))


def set_schedule(assignments: Sequence[str]) -> None:
    """Lets `prepare` make schedules with other values of these fields: `keep=0.5`."""
    fields = {field.name: field.type for field in dataclasses.fields(Schedule)}
    given = dict(assignment.split("=") for assignment in assignments)
    if not given.keys() <= fields.keys():
        raise SystemExit(f"A schedule has {', '.join(fields)}.")
    values = {name: int(value) if fields[name] == "int" else float(value) for name, value in given.items()}
    autogate.api.Schedule = partial(Schedule, **values)


def run(args: argparse.Namespace) -> None:
    for assignment in args.set:
        set_constant(assignment)
    set_schedule(args.schedule)
    changed = [*args.set, *args.schedule]
    if args.threads:
        torch.set_num_threads(args.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    train = load(args.data, "train")
    train, test = held_out(train) if args.held_out else (train, load(args.data, "test"))
    train, test = train.to(device), test.to(device)
    recipe = Recipe(args.epochs, args.peak, compiled=args.compiled)
    folder = args.out / ("held_out" if args.held_out else "test")
    folder.mkdir(parents=True, exist_ok=True)
    for seed, name in itertools.product(args.seeds, args.models):
        dense = dense_model(name, seed, train, test, recipe, folder)
        for flops, method in itertools.product(args.flops, args.methods):
            if method == "dense":
                flops = 1.0
            parts = [name, method.replace(", ", "_").replace(" ", "_"), str(flops), *changed, str(seed)]
            result = once(
                folder / f"{'_'.join(parts)}.json",
                lambda method=method, flops=flops, name=name, seed=seed, dense=dense: (
                    {"model": name, "set": changed} | slim_run(dense, method, flops, seed, train, test, recipe)
                ),
            )
            print(f"{' '.join(parts)}: {result['accuracy']:.2f} %, {result['flops_left']:.4f} of the FLOPs", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    running = commands.add_parser("run", help="train what has no result yet")
    running.add_argument("--data", type=Path, required=True)
    running.add_argument("--models", nargs="+", default=["resnet20"], choices=list(MODELS))
    running.add_argument("--methods", nargs="*", default=list(METHODS), choices=list(METHODS))
    running.add_argument("--flops", type=float, nargs="+", default=[0.5, 0.3])
    running.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    running.add_argument("--epochs", type=int, default=10, help="dense, and again for each method")
    running.add_argument("--peak", type=float, default=0.1, help="learning rate; half of it after the dense training")
    running.add_argument("--compiled", action="store_true", help="torch.compile")
    running.add_argument("--held-out", action="store_true", help="accuracy on a fifth of the training images")
    running.add_argument("--set", nargs="*", default=[], metavar="MODULE.NAME=VALUE")
    running.add_argument("--schedule", nargs="*", default=[], metavar="FIELD=VALUE")
    running.add_argument("--threads", type=int, help="on the CPU")
    running.set_defaults(command=run)
    writing = commands.add_parser("table", help="write the page and the figure")
    writing.add_argument("--docs", type=Path, default=Path("docs/benchmarks"))
    writing.set_defaults(command=lambda args: write(args.out / "test", args.docs))
    for command in (running, writing):
        command.add_argument("--out", type=Path, default=Path("runs/accuracy"))
    args = parser.parse_args()
    args.command(args)


if __name__ == "__main__":
    main()
