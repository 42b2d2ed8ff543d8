"""Damaged files: what reading copies of a checkpoint and of a slim model does after random damage.

    python -m benchmarks.damage --draws 500

Each draw copies a file and flips a bit, zeroes 512 bytes or truncates it, at a random place. Counted is what reading
the copy does: an error that says so; for a checkpoint, the previous one taken with a warning; the content that was
written, because the damaged bytes mean nothing (padding); another error; or other content without a word. The last two
must not happen. The rate of the checksum is printed too.
"""

from __future__ import annotations

import argparse
import collections
import random
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch

import autogate
from autogate.training import Budget, Images, Learning, Network, Recipe
from autogate.training.checkpoint import Checkpoint, Position, load_newest, previous_checkpoint, save_checkpoint
from autogate.training.run_folder import RunInfo
from autogate.training.tensor_files import checksum
from benchmarks.parts import kill
from rewriters import AutogateError

OUTCOMES = ("previous taken", "clear error", "unchanged", "other error", "silently different")


def flip_a_bit(content: bytearray, draw: random.Random) -> bytearray:
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    return content


def zero_a_block(content: bytearray, draw: random.Random) -> bytearray:
    start = draw.randrange(len(content))
    size = min(512, len(content) - start)
    content[start : start + size] = bytes(size)
    return content


def truncate(content: bytearray, draw: random.Random) -> bytearray:
    return content[: draw.randrange(len(content))]


DAMAGES: dict[str, Callable[[bytearray, random.Random], bytearray]] = {
    "flipped bit": flip_a_bit, "512 zeroed bytes": zero_a_block, "truncated": truncate,
}  # fmt: skip


def checkpoint(step: int) -> Checkpoint:
    """A checkpoint of a small network with gates and an optimizer."""
    torch.manual_seed(step)
    model = autogate.prepare(timm.create_model("test_resnet", num_classes=10), torch.randn(2, 3, 64, 64))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(2, 3, 64, 64)).square().mean().backward()
    optimizer.step()
    recipe = Recipe(Network("test_resnet"), Images("images"), Budget(flops=0.5), Learning(epochs=1))
    numbers: dict[str, Any] = dict.fromkeys(
        (
            "num_classes",
            "train_images",
            "val_images",
            "batches",
            "steps_per_epoch",
            "steps",
            "gates",
            "flops",
            "params",
        ),
        1,
    )
    info = RunInfo(1, {}, recipe, input_size=(3, 64, 64), processes=1, targets={"FLOPs": 0.5}, layers=(), **numbers)
    return Checkpoint(info, Position(1, 1, step), model.state_dict(), optimizer.state_dict(), None, None, None)


def damaged_checkpoints(draws: int, alone: bool = False, seed: int = 0) -> dict[str, collections.Counter[str]]:
    """Count the outcomes of `load_newest`, by damage, where the previous checkpoint is whole or (`alone`) missing."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "last.pt"
        for step in (1, 2):
            save_checkpoint(checkpoint(step), file)
        if alone:
            previous_checkpoint(file).unlink()
        whole = checksum(_content(load_newest(file)[0]))

        def read() -> str:
            with warnings.catch_warnings(record=True) as told:
                warnings.simplefilter("always")
                found, taken = load_newest(file)
            if taken != file:
                return (
                    "previous taken" if any("before it is taken" in str(one.message) for one in told) else "other error"
                )
            return "unchanged" if checksum(_content(found)) == whole else "silently different"

        return _count(file, read, draws, seed)


def _content(found: Checkpoint) -> dict[str, Any]:
    return {**vars(found), "info": repr(found.info), "position": repr(found.position)}


def damaged_slim_files(draws: int, seed: int = 0) -> dict[str, collections.Counter[str]]:
    """Count the outcomes of `autogate.load`, by damage."""
    torch.manual_seed(seed)
    model = autogate.prepare(timm.create_model("test_resnet", num_classes=10), torch.randn(2, 3, 64, 64), flops=1.0)
    kill(model, 0.4, seed)
    slim = autogate.finalize(model, warn=False)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "slim.safetensors"
        autogate.save(slim, file)
        whole = checksum(dict(slim.state_dict()))

        def read() -> str:
            return "unchanged" if checksum(dict(autogate.load(file).state_dict())) == whole else "silently different"

        return _count(file, read, draws, seed)


def _count(file: Path, read: Callable[[], str], draws: int, seed: int) -> dict[str, collections.Counter[str]]:
    draw, copy = random.Random(seed), file.read_bytes()
    found = {name: collections.Counter[str]() for name in DAMAGES}
    for name, damage in DAMAGES.items():
        for _ in range(draws):
            file.write_bytes(damage(bytearray(copy), draw))
            try:
                found[name][read()] += 1
            except AutogateError:
                found[name]["clear error"] += 1
            except Exception as error:
                print(f"{name}: {type(error).__name__}: {error}")
                found[name]["other error"] += 1
    file.write_bytes(copy)
    return found


def rate() -> float:
    """Bytes of tensors that `checksum` reads in a second: the best of five."""
    value, seconds = {"weight": torch.randn(25_000_000)}, []
    for _ in range(5):
        began = time.perf_counter()
        checksum(value)
        seconds.append(time.perf_counter() - began)
    return value["weight"].nbytes / min(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=500, help="copies for each kind of file and of damage")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    tables = {
        "checkpoint": damaged_checkpoints(asked.draws, seed=asked.seed),
        "checkpoint without a previous one": damaged_checkpoints(asked.draws, alone=True, seed=asked.seed),
        "slim model": damaged_slim_files(asked.draws, seed=asked.seed),
    }
    print(f"| file | damage | {' | '.join(OUTCOMES)} |\n| --- | --- |{' --- |' * len(OUTCOMES)}")
    for file, found in tables.items():
        for damage, counts in found.items():
            print(f"| {file} | {damage} | {' | '.join(str(counts[outcome]) for outcome in OUTCOMES)} |")
    print(f"\nchecksum of a checkpoint: {rate() / 1e6:.0f} MB/s")


if __name__ == "__main__":
    main()
