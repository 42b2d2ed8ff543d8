"""One run: its settings, how its process is set up, and its result."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from autogate.methods import GDP
from benchmarks.accuracy.data import Data, held_out, load, normalise
from benchmarks.accuracy.methods import METHODS, Task, count_flops
from benchmarks.accuracy.recipe import Recipe, accuracy, fit, loss, predict
from benchmarks.accuracy.runs import dense_model, once


@dataclass(frozen=True)
class Options:
    """The settings that all runs of one call share.

    Attributes:
        data: folder of the images.
        out: folder of the results, either on held-out images or on test images.
        recipe: how networks are trained.
        held_out: whether accuracy is measured on held-out training images.
        method: the method of the runs with gates.
        threads: CPU threads; PyTorch's default if None.
    """

    data: Path
    out: Path
    recipe: Recipe
    held_out: bool
    method: GDP
    threads: int | None


@dataclass(frozen=True)
class Case:
    """One run: a method applied to the network trained with a seed. The run that trains this network has no method."""

    model: str
    seed: int
    method: str | None = None
    flops: float = 1.0

    def parts(self, changed: Sequence[str]) -> list[str]:
        """The stem of the name of the run's file."""
        method = "start" if self.method is None else self.method.replace(", ", "_").replace(" ", "_")
        return [self.model, method, str(self.flops), *changed, str(self.seed)]


@lru_cache
def set_up(options: Options) -> tuple[Data, Data]:
    """Set this process up for running cases, once. Returns the images to train on and those to measure accuracy on."""
    if options.threads:
        torch.set_num_threads(options.threads)
    train = load(options.data, "train")
    train, test = held_out(train) if options.held_out else (train, load(options.data, "test"))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return train.to(device), test.to(device)


def run_case(options: Options, case: Case) -> str:
    """Run a case that has no result yet. Returns the result as a line of text."""
    train, test = set_up(options)
    dense = dense_model(case.model, case.seed, train, test, options.recipe, options.out)
    changed = [f"{name}={value}" for name, value in options.method.settings().items()]
    parts = case.parts(changed)
    if case.method is None:
        return f"{' '.join(parts)}: {dense.accuracy:.2f} %"
    result = once(
        options.out / f"{'_'.join(parts)}.json",
        lambda: {"model": case.model, "set": changed} | slim_run(dense.model, case, train, test, options),
    )
    return f"{' '.join(parts)}: {result['accuracy']:.2f} %, {result['flops_left']:.4f} of the FLOPs"


def slim_run(dense: torch.nn.Module, case: Case, train: Data, test: Data, options: Options) -> dict:
    """Apply one method to one trained network: its accuracy, and the shares of FLOPs and parameters left."""
    model, recipe = copy.deepcopy(dense), options.recipe
    example = normalise(train.images[:2])
    whole, params = count_flops(model, example), sum(parameter.numel() for parameter in model.parameters())

    def report(epoch: int, loss: float) -> None:
        print(f"  {case.method} {case.flops}, seed {case.seed}, epoch {epoch}: loss {loss:.3f}", flush=True)

    def training(model: torch.nn.Module, epochs: int, **settings: Any) -> None:
        fit(model, train, recipe, epochs, recipe.peak / 2, report, **settings)

    torch.manual_seed(1000 + case.seed)
    steps = recipe.steps(train, recipe.epochs)
    task = Task(case.flops, recipe.epochs, steps, recipe.weight_decay, example, training, options.method)
    slim = METHODS[case.method](model, task)
    return {
        "method": case.method,
        "flops_target": case.flops,
        "seed": case.seed,
        "epochs": recipe.epochs,
        "accuracy": accuracy(predict(slim, test.images), test.labels),
        "loss": loss(slim, test),
        "flops_left": count_flops(slim, example) / whole,
        "params_left": sum(parameter.numel() for parameter in slim.parameters()) / params,
    }


def gdp(assignments: Sequence[str]) -> GDP:
    """GDP with other values for these fields: `damping=0.3`."""
    types = {field.name: field.type for field in dataclasses.fields(GDP)}
    given = dict(assignment.split("=") for assignment in assignments)
    if not given.keys() <= types.keys():
        raise SystemExit(f"GDP has {', '.join(types)}.")
    return GDP(**{name: int(value) if types[name] == "int" else float(value) for name, value in given.items()})
