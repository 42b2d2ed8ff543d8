"""`kill -9` at random moments of a run: whether what is resumed ends bit for bit like a run that nobody killed.

    python -m benchmarks.kills --plain 100 --train 30 --notes kills.jsonl

Each draw kills a run once, goes on from its latest checkpoint, and compares all tensors at the end. `--plain` is a
training loop of one's own that writes a checkpoint after every step; `--train` is `autogate train`, its slim model and
the checkpoint. Where the kill came before the first checkpoint, the run begins anew. With `--notes`, a count that is
stopped goes on when the command is given again.
"""

from __future__ import annotations

import argparse
import collections
import functools
import multiprocessing
import os
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from typer.testing import CliRunner

import autogate
from autogate.cli import app
from autogate.training import RunFolder
from autogate.training.checkpoint import load_checkpoint
from benchmarks.interrupts import EXAMPLE, Network
from benchmarks.pieces import counted

STEPS = 60

State = Mapping[str, Tensor]


class Run(NamedTuple):
    """A run in a folder: begins or goes on, says whether it can go on, and gives the tensors that it ends with."""

    go: Callable[[Path], None]
    has_begun: Callable[[Path], bool]
    tensors: Callable[[Path], State]


def plain(folder: Path) -> None:
    """A loop that anyone might write; each batch is drawn from the step's number."""
    torch.manual_seed(0)
    model = autogate.prepare(Network(), EXAMPLE, flops=0.5, steps=STEPS)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    latest, begin = folder / "latest.pt", 0
    if latest.exists():
        saved = torch.load(latest)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        begin = saved["step"]
    for step in range(begin, STEPS):
        images = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), torch.arange(8) % 4).backward()
        optimizer.step()
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}
        torch.save(state, folder / "next.pt")
        os.replace(folder / "next.pt", latest)


def plain_tensors(folder: Path) -> State:
    saved = torch.load(folder / "latest.pt")
    momenta = {f"momentum {name}": one["momentum_buffer"] for name, one in saved["optimizer"]["state"].items()}
    return {**saved["model"], **momenta}


def train(folder: Path, pictures: Path) -> None:
    """`autogate train`, or `autogate train --resume`."""
    settings = ["--img-size", "32", "-b", "6", "-j", "0", "--device", "cpu", "--flops", "0.7", "--epochs", "3"]
    words = ["test_resnet", *settings, "--data", str(pictures), "--out", str(folder / "run")]
    if RunFolder(folder / "run").checkpoint_file.exists():
        words = ["--resume", str(folder / "run"), "-j", "0"]
    told = CliRunner().invoke(app, ["train", *words])
    if told.exit_code:
        raise RuntimeError(told.output)


def train_tensors(folder: Path) -> State:
    run = RunFolder(folder / "run")
    slim = {f"slim {name}": tensor for name, tensor in autogate.load(run.slim_file).state_dict().items()}
    return {**load_checkpoint(run.checkpoint_file).model, **slim}


def paint(folder: Path) -> Path:
    """Noisy images of two classes, 24 to train on and 8 to evaluate on."""
    draw = np.random.default_rng(0)
    for part, count in (("train", 12), ("validation", 4)):
        for channel in range(2):
            (folder / part / str(channel)).mkdir(parents=True)
            for index in range(count):
                pixels = draw.integers(0, 200, (32, 32, 3), dtype=np.uint8)
                pixels[..., channel] += 50
                Image.fromarray(pixels).save(folder / part / str(channel) / f"{index}.png")
    return folder


_PROCESSES = multiprocessing.get_context("forkserver")
_PROCESSES.set_forkserver_preload(["autogate.cli", "benchmarks.interrupts"])
"""Not forks of this process: one that has computed may abort in PyTorch's threads after a fork."""


def _go(run: Callable[[Path], None], folder: Path) -> None:
    torch.set_num_threads(1)
    run(folder)


def _in_process(run: Run, folder: Path, kill_after: float | None = None) -> int | None:
    """Exit code of a process that goes on with the run, killed after so many seconds."""
    process = _PROCESSES.Process(target=_go, args=(run.go, folder))
    process.start()
    process.join(kill_after)
    if process.is_alive():
        process.kill()
        process.join()
    return process.exitcode


def counts(name: str, run: Run, draws: int, seed: int, at: Path, notes: Path | None = None) -> collections.Counter[str]:
    """How runs ended that were killed once (`pieces.counted` has the arguments)."""
    whole = at / "whole"
    whole.mkdir()
    began = time.perf_counter()
    if _in_process(run, whole) != 0:
        raise RuntimeError("the run fails without a kill")
    seconds, wanted = time.perf_counter() - began, run.tensors(whole)

    def once(draw: random.Random) -> str:
        folder = Path(tempfile.mkdtemp(dir=at))
        killed = _in_process(run, folder, draw.uniform(0, seconds)) != 0
        anew = not run.has_begun(folder)
        if anew:
            shutil.rmtree(folder)
            folder.mkdir()
        if _in_process(run, folder) != 0:
            return "does not resume"
        after = run.tensors(folder)
        same = after.keys() == wanted.keys() and all(torch.equal(after[name], wanted[name]) for name in wanted)
        how = "begun anew" if anew else "resumed" if killed else "ended before the kill"
        shutil.rmtree(folder)
        return how if same else f"{how}, and other bits"

    return counted(name, draws, seed, once, notes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plain", type=int, default=100, help="kills of a plain loop")
    parser.add_argument("--train", type=int, default=30, help="kills of `autogate train`")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--notes", type=Path, help="file that notes each outcome")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        pictures = paint(root / "pictures")
        runs = {
            "plain loop": (asked.plain, Run(plain, lambda at: (at / "latest.pt").exists(), plain_tensors)),
            "autogate train": (
                asked.train,
                Run(
                    functools.partial(train, pictures=pictures),
                    lambda at: RunFolder(at / "run").checkpoint_file.exists(),
                    train_tensors,
                ),
            ),
        }
        for name, (draws, run) in runs.items():
            at = root / name.replace(" ", "-")
            at.mkdir()
            print(f"{name}: {dict(counts(name, run, draws, asked.seed, at, asked.notes))}", flush=True)


if __name__ == "__main__":
    main()
