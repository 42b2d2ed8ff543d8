"""The comparison with other methods is fair: published networks, and the same FLOPs for all."""

from __future__ import annotations

import importlib.util
import json
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from autogate.methods.gdp import GDP
from benchmarks.accuracy.__main__ import main
from benchmarks.accuracy.cases import gdp
from benchmarks.accuracy.data import Data, held_out, normalise
from benchmarks.accuracy.methods import METHODS, Task, count_flops
from benchmarks.accuracy.models import MODELS, ResNet
from benchmarks.accuracy.recipe import Recipe, fit, loss
from benchmarks.accuracy.table import results, rows, table, write
from tests.slow import slow_but

PUBLISHED = {"resnet20": 0.27e6, "resnet56": 0.85e6, "vgg16": 14.7e6, "mobilenetv2": 2.2e6}
"""Parameters: He et al., table 6; Liu et al., Network Slimming's VGG without its two linear layers; Sandler et al.'s
network less 990 classes."""


@pytest.mark.parametrize("name", MODELS)
def test_networks_have_the_published_size(name):
    model = MODELS[name]()
    assert sum(parameter.numel() for parameter in model.parameters()) == pytest.approx(PUBLISHED[name], rel=0.03)
    assert model.eval()(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


@pytest.mark.parametrize("method", slow_but(("dense", "autogate"), METHODS))
@pytest.mark.filterwarnings("ignore")
def test_every_method_trains_for_the_same_steps_and_leaves_what_was_asked(method):
    if method in ("l1", "bn slimming", "group sparsity") and importlib.util.find_spec("torch_pruning") is None:
        pytest.skip("needs torch-pruning")
    torch.manual_seed(0)
    model = ResNet(8)
    data = Data(torch.randint(0, 255, (64, 3, 32, 32), dtype=torch.uint8), torch.randint(10, (64,)))
    recipe = Recipe(epochs=4, batch=8)
    spent, optimizers = [], []

    def training(model, epochs, after_epoch=lambda _: None, **settings):
        spent.append(epochs)
        both = lambda optimizer: (after_epoch(optimizer), optimizers.append(optimizer))  # noqa: E731
        fit(model, data, recipe, epochs, 0.01, after_epoch=both, **settings)

    example = torch.randn(2, 3, 32, 32)
    whole = count_flops(model, example)
    slim = METHODS[method](model, Task(0.5, recipe.epochs, recipe.steps(data, recipe.epochs), 5e-4, example, training))
    left = count_flops(slim, example) / whole
    assert sum(spent) == recipe.epochs
    (group,) = optimizers[-1].param_groups
    assert {id(p) for p in group["params"]} == {id(p) for p in slim.parameters()} and group["weight_decay"] == 5e-4
    assert left == 1 if method == "dense" else 0.42 < left <= 0.5


def test_the_held_out_images_are_no_training_images():
    images = torch.arange(50).view(50, 1, 1, 1).expand(50, 3, 32, 32)
    train, kept = held_out(Data(images, torch.arange(50)))
    assert len(kept.labels) == 10 and sorted([*train.labels.tolist(), *kept.labels.tolist()]) == list(range(50))
    assert torch.equal(train.images[:, 0, 0, 0], train.labels)


def leave_runs(folder: Path, method: str, target: float, accuracies: list[float], **others: Any) -> None:
    for seed, accuracy in enumerate(accuracies):
        run = {"model": "resnet20", "set": [], "method": method, "flops_target": target, "seed": seed, "epochs": 10,
               "accuracy": accuracy, "flops_left": target - 0.01, "params_left": 0.4, **others}  # fmt: skip
        (folder / f"{method}_{target}_{seed}_{len(others)}.json").write_text(json.dumps(run))


def test_the_table_has_the_mean_and_its_standard_error(tmp_path):
    leave_runs(tmp_path, "autogate", 0.5, [80.0, 81.0, 82.0])
    leave_runs(tmp_path, "autogate", 0.5, [85.0, 86.0, 87.0], set=["alpha_rate=1"])
    (tmp_path / "dense.json").write_text(json.dumps({"accuracy": 90.0}))
    (row,) = rows(results(tmp_path))
    assert row.mean == 81 and row.error == pytest.approx(1 / 3**0.5) and len(row.by_seed) == 3
    pytest.importorskip("matplotlib")
    write(tmp_path, tmp_path / "docs")
    page = (tmp_path / "docs" / "accuracy.md").read_text()
    assert "| 0.5 | autogate | 0.490 | 0.400 | 81.00 ± 0.58 | 80.00, 81.00, 82.00 |  |" in page
    assert "<svg" in (tmp_path / "docs" / "accuracy.svg").read_text()


def test_methods_are_compared_from_one_and_the_same_network(tmp_path):
    leave_runs(tmp_path, "autogate", 0.5, [80.0, 84.0])
    leave_runs(tmp_path, "autogate", 0.3, [79.0, 83.0])
    leave_runs(tmp_path, "l1", 0.5, [79.0, 82.0, 99.0])
    leave_runs(tmp_path, "l1", 0.3, [78.0])
    leave_runs(tmp_path, "dense", 1.0, [81.0, 85.0])
    text = table("resnet20", rows(results(tmp_path)))
    assert "| 79.00, 82.00, 99.00 | +1.50 ± 0.50 |" in text
    assert "| 78.00 | +1.00 |" in text
    assert "| 81.00, 85.00 | -1.00 ± 0.00 at 0.5, -2.00 ± 0.00 at 0.3 |" in text


def test_other_settings_can_be_tried():
    assert gdp(["keep=0.25", "damping=0.3", "least_steps=7"]) == GDP(keep=0.25, damping=0.3, least_steps=7)
    with pytest.raises(SystemExit, match="keep"):
        gdp(["width=3"])


def test_the_loss_is_the_mean_over_all_images():
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 10))
    data = Data(torch.randint(0, 255, (7, 3, 32, 32), dtype=torch.uint8), torch.randint(10, (7,)))
    wanted = F.cross_entropy(model(normalise(data.images)), data.labels).item()
    assert loss(model, data, batch=3) == pytest.approx(wanted, rel=1e-5)


@pytest.mark.slow
def test_runs_side_by_side_leave_what_runs_one_by_one_leave(tmp_path, monkeypatch, capsys):
    for split in ("train", "test"):
        images = np.random.default_rng(0).integers(0, 255, (128, 32, 32, 3), np.uint8)
        np.savez(tmp_path / f"{split}.npz", images=images, labels=np.arange(128) % 10)
    told, pools = {}, []

    def pool(jobs: int, context: Any) -> ProcessPoolExecutor:
        pools.append(jobs)
        return ProcessPoolExecutor(jobs, context)

    monkeypatch.setattr("benchmarks.accuracy.__main__.ProcessPoolExecutor", pool)
    for jobs in ("1", "2"):
        asked = [
            "accuracy",
            "run",
            "--data",
            str(tmp_path),
            "--out",
            str(tmp_path / jobs),
            "--epochs",
            "1",
            "--seeds",
            "0",
        ]
        asked += ["1", "--methods", "dense", "--flops", "0.5", "0.3", "--jobs", jobs]
        monkeypatch.setattr(sys, "argv", asked)
        main()
        told[jobs] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("resnet20")]
    assert pools == [2]
    assert told["1"] == told["2"] and len(told["2"]) == 4  # dense training has no target: one run a seed
    left = [
        {path.name: json.loads(path.read_text()) for path in (tmp_path / jobs / "test").glob("*.json")} for jobs in "12"
    ]
    assert {name: run["accuracy"] for name, run in left[0].items()} == {
        name: run["accuracy"] for name, run in left[1].items()
    }
    monkeypatch.setattr("benchmarks.accuracy.cases.slim_run", None)  # what has a result isn't run again
    monkeypatch.setattr(sys, "argv", [*asked[:-1], "1"])
    main()
