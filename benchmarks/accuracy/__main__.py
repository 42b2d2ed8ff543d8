"""Accuracy at equal FLOPs and equal epochs: autogate, Torch-Pruning's methods and dense training.

    python -m benchmarks.accuracy run --data FOLDER --out runs/accuracy
    python -m benchmarks.accuracy run --data FOLDER --out runs/accuracy --models resnet56 --epochs 200 --jobs 16
    python -m benchmarks.accuracy table --out runs/accuracy --docs docs/benchmarks

FOLDER has torchvision's CIFAR-10, or `train.npz` and `test.npz` (see `data.load`). All methods start from the same
trained network (one per seed) and train for the same number of epochs. Each run writes one JSON file. A run whose file
exists is skipped, so an interrupted benchmark can be continued.

To choose settings use `--held-out`: a fifth of the training images is never trained on, and accuracy is measured on it.
`--set damping=0.3 keep=0.5` sets fields of `autogate.GDP` for the run.

Torch-Pruning's methods need `pip install torch-pruning`.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.accuracy.cases import Case, Options, gdp, run_case
from benchmarks.accuracy.methods import METHODS
from benchmarks.accuracy.models import MODELS
from benchmarks.accuracy.recipe import Recipe
from benchmarks.accuracy.table import write


def run(args: argparse.Namespace) -> None:
    out = args.out / ("held_out" if args.held_out else "test")
    out.mkdir(parents=True, exist_ok=True)
    options = Options(
        args.data, out, Recipe(args.epochs, args.peak, compiled=args.compiled), args.held_out, gdp(args.set),
        args.threads,
    )  # fmt: skip
    starts = [Case(model, seed) for seed, model in itertools.product(args.seeds, args.models)]
    wanted = [
        replace(start, method=method, flops=1.0 if method == "dense" else flops)
        for start, flops, method in itertools.product(starts, args.flops, args.methods)
    ]
    with in_processes(args.jobs) as each:
        for cases in (starts, dict.fromkeys(wanted)):
            for told in each(partial(run_case, options), cases):
                print(told, flush=True)


@contextmanager
def in_processes(jobs: int) -> Iterator[Callable[..., Iterable[Any]]]:
    """A `map` over this many processes; the built-in one for a single process."""
    if jobs == 1:
        yield map
        return
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        yield pool.map


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    running = commands.add_parser("run", help="train what has no result yet")
    running.add_argument("--data", type=Path, required=True)
    running.add_argument("--models", nargs="+", default=["resnet20"], choices=list(MODELS))
    running.add_argument("--methods", nargs="*", default=list(METHODS), choices=list(METHODS))
    running.add_argument("--flops", type=float, nargs="+", default=[0.5, 0.3])
    running.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    running.add_argument("--epochs", type=int, default=10, help="epochs of dense training, and again of each method")
    running.add_argument("--peak", type=float, default=0.1, help="peak learning rate; half of it after dense training")
    running.add_argument("--compiled", action="store_true", help="use torch.compile")
    running.add_argument("--held-out", action="store_true", help="measure accuracy on a fifth of the training images")
    running.add_argument("--set", nargs="*", default=[], metavar="FIELD=VALUE")
    running.add_argument("--threads", type=int, help="CPU threads")
    running.add_argument("--jobs", type=int, default=1, help="number of parallel runs, each in its own process")
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
