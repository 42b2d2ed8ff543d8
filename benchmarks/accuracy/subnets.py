"""Several widths in one network beside networks of these widths, on CIFAR-10 (Yang et al., "Non-uniform DNN Structured
Subnets Sampling for Dynamic Inference", section V).

    python -m benchmarks.accuracy.subnets run --data CIFAR --block 0
    python -m benchmarks.accuracy.subnets table
    python -m benchmarks.accuracy.subnets figure --out docs/figures/subnets_accuracy.svg

A block is one dense network. Subnets of 5, 22 and 45 % of its FLOPs are found in it by the clipped and by the plain
group Lasso, for as many epochs as everything after that, and by L1 norms with the same part of every layer. From the
dense network's weights each is then trained by itself ("alone"), and all of them and the dense network in one: in turns
("together"), or by the sandwich rule with the largest one's answers as labels ("sandwich"). Networks that were trained
in one are also measured at nine widths between, with norms taken anew (section V.A).

Rows are lines of JSON. What has its rows is skipped, so an interrupted block goes on. `table` and `figure` combine
blocks by the differences within them. CIFAR as for `benchmarks.accuracy`.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import autogate
from autogate import subnets
from autogate.methods import Method
from autogate.switching import Structure
from benchmarks.accuracy.blocks import Dense, Options, dense_network, processor, rows_in, set_up
from benchmarks.accuracy.data import Data
from benchmarks.accuracy.recipe import fit, predict
from benchmarks.accuracy.setting import Setting, Sources
from benchmarks.accuracy.subnets_table import FULL, SHARES, STRUCTURES, UNIFORM, figure, table

BETWEEN = 9
"""Widths between the smallest and the full one, at equal distances."""

LEARNERS: dict[str, Method] = {
    "clipped Lasso": autogate.ClippedLasso(a=0.75),
    "group Lasso": autogate.ClippedLasso(a=math.inf),
}
TURNS: dict[str, Callable[[nn.Module], Iterator[Tensor | None]]] = {
    "together": lambda model: (None for _ in subnets.each(model)),
    "sandwich": lambda model: (active.teacher for active in subnets.each(model, "sandwich")),
}
CALIBRATION = 8
"""Batches that norms of a width between are taken from."""


class Block(NamedTuple):
    """A dense network with what it was trained for."""

    dense: Dense
    setting: Setting
    train: Data
    test: Data
    seed: int

    def fit(self, model: nn.Module, **others: Any) -> None:
        torch.manual_seed(1000 + self.seed)
        fit(model, self.train, self.setting, self.setting.recipe.epochs, self.setting.recipe.peak / 2, **others)

    def score(self, model: nn.Module) -> float:
        return round(self.setting.score(predict(model, self.test.inputs, self.setting), self.test.labels), 2)

    @property
    def circumstances(self) -> dict[str, Any]:
        """What rows must have in common to be compared."""
        recipe = self.setting.recipe
        return {
            "epochs": recipe.epochs, "dense_epochs": recipe.first_epochs, "batch": recipe.batch, "peak": recipe.peak,
            "samples": len(self.train.labels), "test_samples": len(self.test.labels),
        }  # fmt: skip


def found_in(block: Block, structures: str) -> subnets.Found:
    """The subnets' channels, found in a copy of the dense network."""
    model, example = block.dense.model, block.setting.ready(block.train.inputs[:2])
    if structures == UNIFORM:
        return subnets.find(model, example, flops=SHARES, shortcuts="conv", by="l1", allocation="uniform")
    steps = block.setting.recipe.steps(block.train, block.setting.recipe.epochs)
    return subnets.find(
        model, example, flops=SHARES, shortcuts="conv", steps=steps, method=LEARNERS[structures], train=block.fit
    )


def switchable(block: Block, structures: str, folder: Path) -> nn.Module:
    """The dense network with its subnets, untrained: from its file, or found now."""
    device = block.train.inputs.device
    path = folder / f"{block.dense.block}_{structures.replace(' ', '_')}.safetensors"
    if not path.exists():
        model = subnets.fuse(copy.deepcopy(block.dense.model), found_in(block, structures))
        autogate.save(model, path)
    network = block.setting.network(Sources(folder))
    return autogate.load(path, model=network).to(device)


def alone(block: Block, model: nn.Module, name: str) -> Iterator[dict[str, Any]]:
    """One subnet, trained by itself."""
    structure = next(row.structure for row in subnets.status(model).rows if row.structure.name == name)
    slim = subnets.extract(model.eval(), name)
    block.fit(slim)
    yield _row(structure, block.score(slim))


def in_one(block: Block, model: nn.Module, rule: str) -> Iterator[dict[str, Any]]:
    """All subnets, trained in one network; and widths between them."""
    block.fit(model, turns=partial(TURNS[rule], model))
    structures = [row.structure for row in subnets.status(model).rows]
    for structure in structures:
        with subnets.active(model, structure.name):
            yield _row(structure, block.score(model))
    least = structures[0].shares["FLOPs"]
    batches = block.train.some(CALIBRATION * block.setting.recipe.batch).inputs.split(block.setting.recipe.batch)
    for number in range(1, BETWEEN + 1):
        wanted = least + (1 - least) * number / (BETWEEN + 1)
        width = subnets.switch(model, flops=wanted, between=True)
        autogate.recalibrate(model, map(block.setting.ready, batches), batches=len(batches))
        yield {**_row(width, block.score(model)), "subnet": None}


def _row(structure: Structure, score: float) -> dict[str, Any]:
    return {"subnet": structure.name, "flops_left": round(structure.shares["FLOPs"], 4), "score": score}


def cases() -> Iterator[tuple[str, str, str | None]]:
    """Structures, training, and the subnet that is trained alone. The full one is the same for all structures."""
    yield UNIFORM, "alone", FULL
    for structures in STRUCTURES:
        for rule in TURNS:
            yield structures, rule, None
        for share in SHARES:
            yield structures, "alone", f"{share:g}"


def run(args: argparse.Namespace) -> None:
    changed = {name: getattr(args, name) for name in ("epochs", "dense_epochs", "peak", "batch", "compiled")}
    recipe = tuple((name, value) for name, value in changed.items() if value is not None)
    options = Options(
        Sources(args.data), args.out, args.rows, recipe=recipe, samples=args.samples, tested=args.test_samples,
        threads=args.threads,
    )  # fmt: skip
    setting, train, test = set_up(options, args.network)
    for seed in args.block:
        dense = dense_network(args.network, seed, setting, train, test, args.out)
        run_block(Block(dense, setting, train, test, seed), args.out, args.rows)


def run_block(block: Block, folder: Path, rows: Path) -> None:
    """Train what has no rows yet."""
    rows.parent.mkdir(parents=True, exist_ok=True)
    for structures, training, name in cases():
        key = {"block": block.dense.block, "structures": structures, "training": training, **block.circumstances}
        if name is not None:
            key["subnet"] = name
        if any(key.items() <= row.items() for row in rows_in(rows)):
            continue
        model = switchable(block, structures, folder)
        found = alone(block, model, name) if name is not None else in_one(block, model, training)
        told = {"dense_score": block.dense.score, "processor": processor(), "torch": torch.__version__}
        lines = [json.dumps({**key, **row, **told}) for row in found]
        with rows.open("a") as file:
            file.write("\n".join(lines) + "\n")
        print(*lines, sep="\n", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    running = commands.add_parser("run", help="train what has no rows yet")
    running.add_argument("--network", default="resnet20")
    running.add_argument("--block", type=int, nargs="+", default=[0], metavar="SEED")
    running.add_argument("--data", type=Path, required=True)
    for name in ("epochs", "dense-epochs", "batch", "samples", "test-samples", "threads"):
        running.add_argument(f"--{name}", type=int)
    running.add_argument("--peak", type=float, help="peak learning rate; half of it after dense training")
    running.add_argument("--compiled", action="store_true", default=None)
    running.add_argument("--out", type=Path, default=Path("runs/subnets"), help="folder of networks")
    running.set_defaults(command=run)
    commands.add_parser("table", help="print the tables").set_defaults(command=lambda args: table(args.rows))
    drawing = commands.add_parser("figure", help="draw accuracy against FLOPs")
    drawing.add_argument("--out", type=Path, required=True)
    drawing.set_defaults(command=lambda args: figure(args.rows, args.out))
    for command in commands.choices.values():
        command.add_argument("--rows", type=Path, default=Path("docs/benchmarks/data/subnets.jsonl"))
    args = parser.parse_args()
    args.command(args)


if __name__ == "__main__":
    main()
