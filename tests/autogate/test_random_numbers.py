"""No verb uses up random numbers: generators are afterwards as they were, also if the verb raises."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn

import autogate
from autogate.budget import timing
from autogate.files import dense_model, to_onnx, to_torch_export
from autogate.inspection import inspect_model
from tests.autogate.files.slim_nets import example
from tests.slow import slow_but


def states() -> list[Any]:
    """The states of all generators."""
    name, keys, *rest = np.random.get_state()
    of_torch = [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [])]
    return [random.getstate(), name, keys.tolist(), rest, [state.tolist() for state in of_torch]]


class Noisy(nn.Module):
    """Draws from every generator whenever it runs."""

    def forward(self, x: Tensor) -> Tensor:
        return x + 0 * (random.random() + np.random.rand() + torch.rand(()))


def dense(device: str = "cpu") -> nn.Module:
    model = timm.create_model("test_resnet", num_classes=10)
    model.layer1.append(Noisy())
    return model.to(device)


def gated() -> nn.Module:
    model = autogate.prepare(dense(), example(), flops=1.0)
    with torch.no_grad():
        autogate.gates(model).alpha[::3] = 0
    return model


def slim() -> nn.Module:
    model = autogate.prepare(timm.create_model("test_resnet", num_classes=10), example(), flops=1.0)
    with torch.no_grad():
        autogate.gates(model).alpha[::3] = 0
    return autogate.finalize(model, warn=False)


def file(folder: Path) -> Path:
    autogate.save(slim(), folder / "slim.safetensors")
    return folder / "slim.safetensors"


VERBS: dict[str, tuple[Callable[[Path], Any], Callable[[Any], Any]]] = {
    "prepare": (lambda _: dense(), lambda model: autogate.prepare(model, example())),
    "prepare without inputs": (lambda _: dense(), autogate.prepare),
    "prepare with convolutions": (lambda _: dense(), lambda model: autogate.prepare(model, shortcuts="conv")),
    "prepare with latency": (lambda _: dense(), lambda model: autogate.prepare(model, example(), latency=0.8)),
    "inspect": (lambda _: dense(), lambda model: inspect_model(model, example())),
    "summary": (lambda _: gated(), autogate.summary),
    "finalize": (lambda _: gated(), lambda model: autogate.finalize(model, warn=False)),
    "save": (lambda folder: (slim(), folder / "new"), lambda given: autogate.save(*given)),
    "load": (file, autogate.load),
    "dense_model": (file, dense_model),
    "to_timm_text": (lambda _: slim(), autogate.to_timm_text),
    "to_torch_export": (lambda folder: (slim(), folder / "new"), lambda given: to_torch_export(*given)),
    "to_onnx": (lambda folder: (slim(), folder / "new"), lambda given: to_onnx(*given)),
}


@pytest.fixture(autouse=True)
def quick_timings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AUTOGATE_CACHE", str(tmp_path / "timings"))
    monkeypatch.setattr(timing, "SECONDS", 1e-4)


@pytest.mark.parametrize("verb", slow_but(VERBS.keys() - {"to_onnx"}, VERBS))
def test_random_numbers_are_left_alone(verb: str, tmp_path: Path):
    given, call = VERBS[verb]
    for _ in range(2 if "latency" in verb else 1):  # the second time, all timings are cached
        asked = given(tmp_path)
        before = states()
        call(asked)
        assert states() == before


def test_an_error_leaves_them_alone_too():
    class Failing(Noisy):
        def forward(self, x: Tensor) -> Tensor:
            super().forward(x)
            raise ValueError

    model, inputs = nn.Sequential(nn.Conv2d(3, 8, 1), Failing(), nn.Conv2d(8, 2, 1)), example()
    before = states()
    with pytest.raises(autogate.AutogateError):
        autogate.prepare(model, inputs)
    assert states() == before


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("options", [{}, {"shortcuts": "conv"}, {"latency": 0.8}])
def test_random_numbers_of_a_gpu_are_left_alone(options: dict[str, Any]):
    model = dense("cuda")
    before = states()
    autogate.finalize(autogate.prepare(model, **options), warn=False)
    assert states() == before
