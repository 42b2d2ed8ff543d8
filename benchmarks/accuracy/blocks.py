"""Blocks: one dense network, and every method from it, on one machine and with one seed.

What counts are differences within a block, so blocks of several machines and days can be combined. A block is known by
the checksum of its dense network. Its results are rows of a JSON lines file of that name; a case that has its row isn't
run again.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import platform
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from autogate.methods import GDP
from autogate.saliency import saliency_of
from benchmarks.accuracy.adaptive import ADAPTIVE, mean_cost
from benchmarks.accuracy.data import Data, held_out, layout
from benchmarks.accuracy.methods import OURS, Method, Task, count_flops, dense, scratch
from benchmarks.accuracy.peers import PEERS
from benchmarks.accuracy.recipe import fit, loss, predict
from benchmarks.accuracy.setting import Recipe, Setting, Sources
from benchmarks.accuracy.settings import SETTINGS

SCRATCH = "autogate's widths from scratch"

METHODS: dict[str, Method] = {"dense": dense, **OURS, **ADAPTIVE, **PEERS, SCRATCH: scratch}

CALIBRATION = 4
"""Batches that criteria are given."""


@dataclass(frozen=True)
class Options:
    """What all runs of one call share.

    Attributes:
        sources: where data and trained weights lie.
        weights: folder of the dense networks that were trained here.
        rows: folder of the results.
        held_out: whether scores are measured on held-out training samples.
        method: the method of the runs with gates.
        recipe: replaces values of the setting's recipe.
        samples: how many training samples are used; all if None.
        tested: how many test samples scores are measured on; all if None.
        threads: CPU threads; PyTorch's default if None.
    """

    sources: Sources
    weights: Path
    rows: Path
    held_out: bool = False
    method: GDP = dataclasses.field(default_factory=GDP)
    recipe: tuple[tuple[str, Any], ...] = ()
    samples: int | None = None
    tested: int | None = None
    threads: int | None = None

    @property
    def changed(self) -> list[str]:
        """Fields of GDP that were set, as they are in rows."""
        return [f"{name}={value}" for name, value in self.method.settings().items()]


@dataclass(frozen=True)
class Case:
    """One run: a method applied to the network trained with a seed. The run that trains this network has no method."""

    setting: str
    seed: int
    method: str | None = None
    flops: float = 1.0

    def __str__(self) -> str:
        method = "the dense network" if self.method is None else f"{self.method}, {self.flops:g} of the FLOPs"
        return f"{self.setting}, seed {self.seed}, {method}"


class Dense(NamedTuple):
    """A trained network, its score and the name of its block."""

    model: nn.Module
    score: float
    block: str


@lru_cache
def set_up(options: Options, name: str) -> tuple[Setting, Data, Data]:
    """Set this process up, once. Returns the setting, the samples to train on and those that scores are measured on."""
    if options.threads:
        torch.set_num_threads(options.threads)
    setting = SETTINGS[name]
    if setting.needs_weights and options.sources.weights is None:
        raise SystemExit(f"{name} needs --weights: see benchmarks/accuracy/settings.py")
    train = setting.load(options.sources, "train").some(options.samples)
    train, test = held_out(train) if options.held_out else (train, setting.load(options.sources, "test"))
    test = test.some(options.tested)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    recipe: Recipe = replace(setting.recipe, **dict(options.recipe))
    return replace(setting, recipe=recipe), train.to(device), test.to(device)


def dense_network(
    name: str, seed: int, setting: Setting, train: Data, test: Data, folder: Path, sources: Sources | None = None
) -> Dense:
    """The trained network that all methods start from, loaded from its file or trained now."""
    torch.manual_seed(seed)
    device = train.inputs.device
    model = setting.network(sources or Sources(folder)).to(device, memory_format=layout(device))
    path = folder / f"{name}_dense_{seed}.pt"
    if path.exists():
        model.load_state_dict(torch.load(path, weights_only=True, map_location=device))
    else:
        epochs = setting.recipe.first_epochs
        if epochs:
            fit(model, train, setting, epochs, setting.recipe.peak, _printed(f"{name}, dense, seed {seed}"))
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(model.state_dict(), path)
    score = setting.score(predict(model, test.inputs, setting), test.labels)
    return Dense(model, score, f"{name}_{seed}_{_checksum(model)}")


def _printed(what: str) -> Any:
    return lambda epoch, loss: print(f"  {what}, epoch {epoch}: loss {loss:.3f}", flush=True)


def _checksum(model: nn.Module) -> str:
    found = hashlib.sha256()
    for value in model.state_dict().values():
        found.update(value.cpu().contiguous().numpy().tobytes())
    return found.hexdigest()[:8]


def rows_in(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a file, or of all files of a folder."""
    for file in sorted(path.glob("*.jsonl")) if path.is_dir() else [path] if path.exists() else []:
        yield from map(json.loads, file.read_text().splitlines())


def run_case(options: Options, case: Case) -> str:
    """Run a case that has no row yet, and append its row. Returns the result as a line of text."""
    setting, train, test = set_up(options, case.setting)
    dense = dense_network(case.setting, case.seed, setting, train, test, options.weights, options.sources)
    if case.method is None:
        return f"{case}: {dense.score:.2f} {setting.unit}"
    circumstances = _circumstances(setting, train, test)
    key = {"method": case.method, "flops_target": case.flops, "set": options.changed, **circumstances}
    path = options.rows / f"{dense.block}.jsonl"
    row = next((row for row in rows_in(path) if key.items() <= row.items()), None)
    if row is None:
        started = time.time()
        found = slim_run(dense.model, case, setting, train, test, options)
        row = {
            "block": dense.block, "setting": case.setting, "seed": case.seed, "dense_score": dense.score,
            "unit": setting.unit, **key, **found, "seconds": round(time.time() - started),
            "processor": processor(), "torch": torch.__version__,
        }  # fmt: skip
        options.rows.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:
            file.write(json.dumps(row) + "\n")
    return f"{case}: {row['score']:.2f} {setting.unit}, {row['flops_left']:.4f} left"


def _circumstances(setting: Setting, train: Data, test: Data) -> dict[str, int]:
    """What rows must have in common to be compared."""
    return {
        "epochs": setting.recipe.epochs, "dense_epochs": setting.recipe.first_epochs, "samples": len(train.labels),
        "test_samples": len(test.labels),
    }  # fmt: skip


def slim_run(
    dense: nn.Module, case: Case, setting: Setting, train: Data, test: Data, options: Options
) -> dict[str, Any]:
    """Apply one method to one trained network: its score, and the shares of FLOPs and parameters left."""
    model, recipe = copy.deepcopy(dense), setting.recipe
    example = setting.ready(train.inputs[:2])
    whole, params = count_flops(model, example), sum(parameter.numel() for parameter in model.parameters())

    def training(model: nn.Module, epochs: int, peak: float | None = None, **others: Any) -> None:
        fit(model, train, setting, epochs, peak or recipe.peak / 2, _printed(str(case)), **others)

    torch.manual_seed(1000 + case.seed)
    some = train.some(CALIBRATION * recipe.batch)  # files may be sorted by class
    batches = zip(*(tensor.split(recipe.batch) for tensor in some), strict=True)
    task = Task(
        flops=case.flops, recipe=recipe, steps=recipe.steps(train, recipe.epochs), example=example,
        batches=[(setting.ready(inputs), labels) for inputs, labels in batches], loss=setting.loss,
        heads=setting.heads, fit=training, method=options.method,
    )  # fmt: skip
    slim = METHODS[case.method](model, task)
    return {
        "score": setting.score(predict(slim, test.inputs, setting), test.labels),
        "loss": loss(slim, test, setting),
        "flops_left": share_left(slim, whole, example, test, setting),
        "params_left": sum(parameter.numel() for parameter in slim.parameters()) / params,
    }


def share_left(model: nn.Module, whole: float, example: Tensor, test: Data, setting: Setting) -> float:
    """The share of the FLOPs left; where channels are chosen for each image, the mean over the test images."""
    if saliency_of(model) is None:
        return count_flops(model, example) / whole
    return mean_cost(model, map(setting.ready, test.inputs.split(setting.at_once)))


def processor() -> str:
    """The name of the device that trains."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    told = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in told.read_text().splitlines() if line.startswith("model name")] \
        if told.exists() else []  # fmt: skip
    return names[0] if names else platform.processor() or platform.machine()


def gdp(assignments: Sequence[str]) -> GDP:
    """GDP with other values for these fields: `damping=0.3`."""
    types = {field.name: field.type for field in dataclasses.fields(GDP)}
    given = dict(assignment.split("=") for assignment in assignments)
    if not given.keys() <= types.keys():
        raise SystemExit(f"GDP has {', '.join(types)}.")
    return GDP(**{name: int(value) if types[name] == "int" else float(value) for name, value in given.items()})
