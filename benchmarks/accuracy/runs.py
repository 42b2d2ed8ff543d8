"""Runs that write one file each, and the trained networks that they start from."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from benchmarks.accuracy.data import Data, layout
from benchmarks.accuracy.models import MODELS
from benchmarks.accuracy.recipe import Recipe, accuracy, fit, predict


def once(path: Path, run: Callable[[], dict]) -> dict:
    """The result in `path`; if there is none, run it now."""
    if not path.exists():
        started = time.time()
        result = run()
        path.write_text(json.dumps(result | {"seconds": round(time.time() - started)}, indent=1))
    return json.loads(path.read_text())


class Dense(NamedTuple):
    """A trained network and its accuracy in percent."""

    model: nn.Module
    accuracy: float


def dense_model(name: str, seed: int, train: Data, test: Data, recipe: Recipe, out: Path) -> Dense:
    """The trained network that all methods start from, loaded from its file or trained now."""
    torch.manual_seed(seed)
    device = train.images.device
    model = MODELS[name]().to(device, memory_format=layout(device))
    weights = out / f"{name}_dense_{seed}.pt"

    def run() -> dict:
        fit(
            model, train, recipe, recipe.epochs, recipe.peak,
            lambda epoch, loss: print(f"  {name}, dense, epoch {epoch}: loss {loss:.3f}", flush=True),
        )  # fmt: skip
        torch.save(model.state_dict(), weights)
        return {"accuracy": accuracy(predict(model, test.images), test.labels)}

    result = once(weights.with_suffix(".json"), run)
    model.load_state_dict(torch.load(weights, weights_only=True))
    return Dense(model, result["accuracy"])
