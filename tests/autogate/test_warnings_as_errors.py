"""A warning that the caller has turned into an error stops a verb before anything is done, or undoes what was done."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

import autogate
from benchmarks.interrupts import EXAMPLE, Network, of_model, of_process


@pytest.fixture(autouse=True)
def warnings_are_errors() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "the model looks untrained")  # it is
        yield


def test_finalize_leaves_the_model_and_the_optimizer_as_they_were():
    model = autogate.prepare(Network(), EXAMPLE, flops=0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    process, own, trained = of_process(), of_model(model), list(map(id, optimizer.param_groups[0]["params"]))
    with pytest.raises(autogate.BudgetNotMetWarning, match=r"after 0 of 10000 steps: 100\.0% of the FLOPs are left"):
        autogate.finalize(model, optimizer=optimizer)
    assert (of_model(model), of_process()) == (own, process)
    assert list(map(id, optimizer.param_groups[0]["params"])) == trained
    model(EXAMPLE).sum().backward()
    optimizer.step()
    assert autogate.gates(model).progress().step == 1
    assert isinstance(autogate.finalize(model, warn=False), Network)


def test_prepare_leaves_the_model_as_it_was():
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 2, 1))
    process, own = of_process(), of_model(model)
    with pytest.raises(UserWarning, match="changed nothing"):
        autogate.prepare(model, EXAMPLE, shortcuts="conv")
    assert (of_model(model), of_process()) == (own, process)
    autogate.prepare(model, EXAMPLE)


def test_a_warning_of_the_models_own_is_the_models_error():
    class Warns(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            warnings.warn("deprecated", stacklevel=1)
            return x

    model = nn.Sequential(nn.Conv2d(3, 8, 1), Warns(), nn.Conv2d(8, 2, 1))
    process, own = of_process(), of_model(model)
    with pytest.raises(autogate.CaptureError, match="deprecated"):
        autogate.prepare(model, EXAMPLE)
    assert (of_model(model), of_process()) == (own, process)


def test_an_optimizer_built_too_early_is_told_before_it_steps():
    model = Network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    autogate.prepare(model, EXAMPLE, shortcuts="conv")
    steps = [optimizer.step, optimizer.step]
    model(EXAMPLE).sum().backward()
    steps[0]()
    own = of_model(model)
    with pytest.raises(UserWarning, match="no optimizer trains"):
        steps[1]()
    assert of_model(model) == own
    steps[1]()
    assert autogate.gates(model).progress().step == 2


def test_the_other_verbs_warn_of_nothing(tmp_path: Path):
    model = autogate.prepare(Network(), EXAMPLE, flops=1.0)
    autogate.summary(model)
    with torch.no_grad():
        autogate.gates(model).alpha[:4] = 0
    autogate.save(autogate.finalize(model, warn=False), tmp_path / "slim")
    assert autogate.load(tmp_path / "slim", Network())(EXAMPLE).shape == (2, 4)
