"""Every timm model: prepare, random classes dead, finalize. Measures the reach of gates, time and memory, and failures.

    python -m benchmarks.coverage --out runs/coverage.jsonl --jobs 2
    python -m benchmarks.coverage --sample one-per-file --out runs/sample.jsonl
    python -m benchmarks.coverage --models "vit_*" "torchvision:*" --out runs/some.jsonl
    python -m benchmarks.coverage --method prepare --out runs/prepared.jsonl
    python -m benchmarks.coverage --method torch-pruning --out runs/peer.jsonl

Each model is measured in a process of its own, with a limit on memory and on time, and gets one line of JSON. Models
that are already in the output file are skipped. Weights and norms' statistics are random. The fields of a line are
those of `benchmarks.coverage_model.Result`, or `peer` for the other method, with the cost of `prepare` beside it;
`python -m benchmarks.coverage_table` writes docs/coverage.md from the lines of both methods.
"""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import json
import multiprocessing
import random
import resource
import signal
import tempfile
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

import autogate
from benchmarks.coverage_model import Result, build, measure_here, prepared, small
from benchmarks.model_lists import Listed, listed, smallest_of_each_file
from benchmarks.parts import append, lines
from benchmarks.peer import torch_pruning

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["benchmarks.model_lists", "benchmarks.parts"])  # imports take seconds

PEER_SECONDS = 30
"""Limit on the peer's processor time for a model, in seconds; some models take it hours."""

TURNS = 3
"""How often the peer and `prepare` are timed in turn, if both can process a model."""


@dataclass(frozen=True)
class Limits:
    """Limits on a process's memory (data, without files) and processor time."""

    memory_gib: float
    seconds: int

    @property
    def told(self) -> str:
        return f"{self.seconds} s of processor time are over, or all memory taken"


_TOLD = {"step", "error", "reach", "left", "difference", "double_difference", "spread", "prepare_s"}


def measure_autogate(one: Listed, limits: Limits, prepare_only: bool = False) -> dict[str, Any]:
    """A line of `Result`, measured in a process of its own."""
    result, ended = apart(partial(measure_here, prepare_only=prepare_only), one, limits)
    result = result or asdict(Result(one.name, one.family, one.arguments, step="build"))
    if ended:
        result["error"], result["step"] = f"in {result['step']}: {ended}", "time" if limits.told in ended else "crash"
    print(one.name, {key: value for key, value in result.items() if value and key in _TOLD}, flush=True)
    return result


def measure_peer(one: Listed, limits: Limits) -> dict[str, Any]:
    """A line with Torch-Pruning's figures (see `benchmarks.peer`), measured in a process of its own."""
    done, ended = apart(_measure_peer, one, replace(limits, seconds=min(limits.seconds, PEER_SECONDS)))
    peer = done or {"seconds": None, "left": None, "error": ended}
    print(f"{one.name}: {peer}", flush=True)
    return {"model": one.name, "peer": peer}


METHODS: dict[str, Callable[[Listed, Limits], dict[str, Any]]] = {
    "autogate": measure_autogate,
    "prepare": partial(measure_autogate, prepare_only=True),
    "torch-pruning": measure_peer,
}


def _measure_peer(one: Listed, out: Path) -> None:
    """The peer's figures, and the seconds of `prepare` in the same process: the least over all turns, for both."""
    model, example = small()
    torch_pruning(model, ((example,), {}))
    autogate.prepare(*small())
    theirs, ours = [], []
    for _ in range(TURNS):
        peer = torch_pruning(*build(one))
        theirs.append(peer["seconds"])
        peer |= {"seconds": min(theirs), "prepare_s": min(ours, default=None)}
        out.write_text(json.dumps(peer))
        with contextlib.suppress(autogate.AutogateError):
            _, seconds = prepared(*build(one))
            ours.append(seconds)
            out.write_text(json.dumps(peer | {"prepare_s": min(ours)}))
        if peer["error"] or not ours:
            break


def apart(target: Callable[[Listed, Path], None], one: Listed, limits: Limits) -> tuple[dict[str, Any] | None, str]:
    """What `target` wrote into its file, and how its process ended, if not normally."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "result.json"
        process = PROCESSES.Process(target=_limited, args=(target, one, out, limits))
        process.start()
        process.join()
        ended = f"ended with {process.exitcode}" if process.exitcode else ""
        if process.exitcode in (-signal.SIGXCPU, -signal.SIGKILL):
            ended = limits.told
        return json.loads(out.read_text()) if out.exists() else None, ended


def _limited(target: Callable[[Listed, Path], None], one: Listed, out: Path, limits: Limits) -> None:
    limit = int(limits.memory_gib * 2**30)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CPU, (limits.seconds, limits.seconds + 5))
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    target(one, out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=["*"], help="patterns of names, for fnmatch")
    parser.add_argument("--sample", default="all", help="all, one-per-file, or a number of random models")
    parser.add_argument(
        "--size", type=int, default=0, help="side of the images, for models that take any size; 0 for their own"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/coverage.jsonl"))
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--memory", type=float, default=20.0, help="limit on a model's memory, in GiB")
    parser.add_argument("--timeout", type=int, default=600, help="limit on a model's processor time, in seconds")
    parser.add_argument("--method", choices=list(METHODS), default="autogate")
    args = parser.parse_args()
    every = listed(args.size)
    models = list(dict.fromkeys(one for p in args.models for one in every if fnmatch.fnmatchcase(one.name, p)))
    if args.sample == "one-per-file":
        models = smallest_of_each_file(models, args.out.parent / "parameters.json")
    elif args.sample != "all":
        models = random.Random(0).sample(models, int(args.sample))
    done = {line["model"] for line in lines(args.out)}
    left = [one for one in models if one.name not in done]
    with contextlib.ExitStack() as stack:
        pool = stack.enter_context(ThreadPoolExecutor(args.jobs))
        limits = Limits(args.memory, args.timeout)
        for future in as_completed([pool.submit(METHODS[args.method], one, limits) for one in left]):
            append(args.out, future.result())


if __name__ == "__main__":
    main()
