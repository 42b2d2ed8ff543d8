"""The comparison with other methods is fair: published networks, the same FLOPs for all, differences within blocks."""

from __future__ import annotations

import importlib.util
import json
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from autogate.methods.gdp import GDP
from benchmarks.accuracy import sentences, street_scenes
from benchmarks.accuracy.__main__ import main
from benchmarks.accuracy.adaptive import ADAPTIVE
from benchmarks.accuracy.blocks import METHODS, SCRATCH, dense_network, gdp, rows_in
from benchmarks.accuracy.data import Data, held_out, normalise
from benchmarks.accuracy.lite0 import load_weights
from benchmarks.accuracy.methods import count_flops
from benchmarks.accuracy.models import MODELS, ResNet
from benchmarks.accuracy.recipe import loss
from benchmarks.accuracy.setting import Recipe, Sources
from benchmarks.accuracy.settings import CIFAR, SETTINGS
from benchmarks.accuracy.table import rows, table, titles, write
from tests.benchmarks.tasks import tried
from tests.slow import slow_but

PUBLISHED = {"resnet20": 0.27e6, "resnet56": 0.85e6, "vgg16": 14.7e6, "mobilenetv2": 2.2e6, "mcifarnet": 1.3e6}
PUBLISHED["vgg16_half"] = PUBLISHED["vgg16"] / 4
"""Parameters: He et al., table 6; Liu et al., Network Slimming's VGG without its two linear layers; Sandler et al.'s
network less 990 classes; eight convolutions that cost what Chen et al.'s table 1 says."""


@pytest.mark.parametrize("name", MODELS)
def test_networks_have_the_published_size(name):
    model = MODELS[name]()
    assert sum(parameter.numel() for parameter in model.parameters()) == pytest.approx(PUBLISHED[name], rel=0.03)
    assert model.eval()(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


@pytest.mark.parametrize(
    "method", slow_but(("dense", "autogate", "autogate, Taylor at once"), [m for m in METHODS if m not in ADAPTIVE])
)
@pytest.mark.filterwarnings("ignore")
def test_every_method_trains_for_the_same_steps_and_leaves_what_was_asked(method):
    if method.startswith("Torch-Pruning") and importlib.util.find_spec("torch_pruning") is None:
        pytest.skip("needs torch-pruning")
    run = tried()
    task = run.task(0.5)
    whole = count_flops(run.model, task.example)
    slim = METHODS[method](run.model, task)
    left = count_flops(slim, task.example) / whole
    assert sum(run.epochs) == 4 + (3 + 4) * (method == SCRATCH)  # gates choose the widths, and dense epochs count
    (group,) = run.optimizers[-1].param_groups
    assert {id(p) for p in group["params"]} == {id(p) for p in slim.parameters()} and group["weight_decay"] == 5e-4
    assert left == 1 if method == "dense" else 0.42 < left <= 0.5


def test_the_held_out_samples_are_no_training_samples():
    images = torch.arange(50).view(50, 1, 1, 1).expand(50, 3, 32, 32)
    train, kept = held_out(Data(images, torch.arange(50)))
    assert len(kept.labels) == 10 and sorted([*train.labels.tolist(), *kept.labels.tolist()]) == list(range(50))
    assert torch.equal(train.inputs[:, 0, 0, 0], train.labels)


def test_some_samples_are_drawn_from_all():
    sorted_by_class = Data(torch.arange(100), torch.arange(100) // 10)
    some = sorted_by_class.some(50)
    assert len(some.labels.unique()) > 5 and torch.equal(some.inputs // 10, some.labels)
    assert torch.equal(some.inputs, sorted_by_class.some(50).inputs) and sorted_by_class.some(None) is sorted_by_class


def leave_rows(folder: Path, method: str, target: float, scores: list[float], **others: Any) -> None:
    """A row in each of the blocks 0, 1, ..."""
    for seed, score in enumerate(scores):
        row = {"block": f"resnet20_{seed}", "setting": "resnet20", "seed": seed, "set": [], "method": method,
               "flops_target": target, "epochs": 10, "dense_epochs": 8, "samples": 50_000, "test_samples": 10_000,
               "unit": "accuracy (%)", "score": score, "dense_score": 80.0 + seed, "flops_left": target - 0.01,
               "params_left": 0.4, "processor": "one" if seed else "another", **others}  # fmt: skip
        with (folder / f"{row['block']}.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")


def only_title(folder: Path) -> tuple[str, list[dict]]:
    ((title, found),) = titles(rows_in(folder)).items()
    return title, found


def test_the_table_has_the_mean_over_blocks_and_its_standard_error(tmp_path):
    leave_rows(tmp_path, "autogate", 0.5, [80.0, 81.0, 82.0])
    leave_rows(tmp_path, "autogate", 0.5, [85.0, 86.0, 87.0], set=["alpha_rate=1"])
    (row,) = rows(only_title(tmp_path)[1])
    assert row.mean == 81 and row.error == pytest.approx(1 / 3**0.5) and len(row.by_block) == 3
    pytest.importorskip("matplotlib")
    write(tmp_path, tmp_path / "docs")
    page = (tmp_path / "docs" / "accuracy.md").read_text()
    assert "## resnet20, 8 + 10 epochs, 50,000 samples, tested on 10,000" in page
    assert "3 blocks, on another; one. The networks that all methods start from have 81.00 ± 0.58." in page
    assert "| 0.5 | autogate | 0.490 | 0.400 | 81.00 ± 0.58 | 80.00, 81.00, 82.00 |  |" in page
    assert "<svg" in (tmp_path / "docs" / "figures" / "accuracy_resnet20_8_10.svg").read_text()


def test_methods_are_compared_within_blocks(tmp_path):
    leave_rows(tmp_path, "autogate", 0.5, [80.0, 84.0])
    leave_rows(tmp_path, "autogate", 0.3, [79.0, 83.0])
    leave_rows(tmp_path, "l1", 0.5, [79.0, 82.0, 99.0])
    leave_rows(tmp_path, "l1", 0.3, [78.0])
    leave_rows(tmp_path, "dense", 1.0, [81.0, 85.0])
    text = table(*only_title(tmp_path))
    assert "| 79.00, 82.00, 99.00 | +1.50 ± 0.50 |" in text
    assert "| 78.00 | +1.00 |" in text
    assert "| 81.00, 85.00 | -1.00 ± 0.00 at 0.5, -2.00 ± 0.00 at 0.3 |" in text


def test_runs_of_other_lengths_are_not_compared(tmp_path):
    leave_rows(tmp_path, "autogate", 0.5, [80.0])
    leave_rows(tmp_path, "l1", 0.5, [79.0], epochs=20)
    assert len(titles(rows_in(tmp_path))) == 2


def test_other_settings_can_be_tried():
    assert gdp(["keep=0.25", "damping=0.3", "least_steps=7"]) == GDP(keep=0.25, damping=0.3, least_steps=7)
    with pytest.raises(SystemExit, match="keep"):
        gdp(["width=3"])


def test_the_loss_is_the_mean_over_all_samples():
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 10))
    data = Data(torch.randint(0, 255, (7, 3, 32, 32), dtype=torch.uint8), torch.randint(10, (7,)))
    wanted = F.cross_entropy(model(normalise(data.inputs)), data.labels).item()
    assert loss(model, data, replace(CIFAR["resnet20"], at_once=3)) == pytest.approx(wanted, rel=1e-5)


def test_pixels_that_do_not_count_change_no_score():
    labels = torch.tensor([[[0, 0, 1, street_scenes.VOID]]])
    told = torch.tensor([[[0, 1, 1, 5]]])
    assert street_scenes.mean_iou(told, labels) == pytest.approx(50.0)  # one of two, of both classes
    outputs = torch.randn(1, street_scenes.CLASSES, 1, 4)
    rest = F.cross_entropy(outputs[..., :3], labels[..., :3])
    assert street_scenes.loss(outputs, labels).item() == pytest.approx(rest.item(), rel=1e-6)


def test_street_scenes_are_cropped_like_their_labels():
    labels = torch.arange(120 * 160).view(1, 120, 160)
    images, cut = street_scenes.crops(labels.unsqueeze(1), labels)
    assert images.shape[2:] == cut.shape[1:] == street_scenes.CROP and torch.equal(images[:, 0], cut)


def test_sentences_are_sentences():
    found = sentences.sentences()
    assert len(found) > 1000 and all(one[0].isupper() and one[-1] in ".!?" for one in found)


@pytest.mark.slow  # imports transformers
def test_padding_changes_no_sentence_vector():
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    encoder = sentences.Encoder(transformers.BertModel(config)).eval()
    tokens = torch.stack([torch.randint(50, (2, 6)), torch.ones(2, 6, dtype=torch.long)], 1)
    padded = F.pad(tokens, (0, 3))
    torch.testing.assert_close(encoder(tokens), encoder(padded), rtol=1e-5, atol=1e-6)


def test_weights_of_the_package_are_paired_by_position(tmp_path):
    theirs = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 5))
    torch.save(theirs.state_dict(), tmp_path / "weights.pt")
    own = nn.ModuleDict({"stem": nn.Conv2d(3, 4, 1), "norm": nn.BatchNorm2d(4)})  # a body without the classifier
    load_weights(own, tmp_path / "weights.pt")
    assert torch.equal(own["stem"].weight, theirs[0].weight) and torch.equal(own["norm"].weight, theirs[1].weight)
    other = nn.ModuleDict({"norm": nn.BatchNorm2d(4), "stem": nn.Conv2d(3, 4, 1)})
    with pytest.raises(RuntimeError, match="size mismatch"):
        load_weights(other, tmp_path / "weights.pt")


def test_a_setting_with_trained_weights_asks_for_them(tmp_path, monkeypatch):
    assert {name for name, setting in SETTINGS.items() if setting.needs_weights} == {"transfer", "camvid", "sentences"}
    monkeypatch.setattr(sys, "argv", ["accuracy", "run", "--setting", "transfer", "--data", str(tmp_path)])
    with pytest.raises(SystemExit, match="--weights"):
        main()


def noise(folder: Path, count: int = 128) -> None:
    for split in ("train", "test"):
        images = np.random.default_rng(0).integers(0, 255, (count, 32, 32, 3), np.uint8)
        np.savez(folder / f"{split}.npz", images=images, labels=np.arange(count) % 10)


def test_a_block_is_known_by_its_dense_network(tmp_path):
    noise(tmp_path, 64)
    setting = replace(CIFAR["resnet20"], network=lambda _: ResNet(8), recipe=Recipe(epochs=1, batch=8))
    data = setting.load(Sources(tmp_path), "train")
    made = dense_network("net", 0, setting, data, data, tmp_path)
    again = dense_network("net", 0, setting, data, data, tmp_path)  # from its file
    other = dense_network("net", 1, setting, data, data, tmp_path)
    sums = [one.block.removeprefix(f"net_{seed}_") for seed, one in ((0, made), (0, again), (1, other))]
    assert sums[0] == sums[1] != sums[2] and len(sums[2]) == len(sums[0]) == 8
    assert all(torch.equal(a, b) for a, b in zip(made.model.parameters(), again.model.parameters(), strict=True))


@pytest.mark.slow
def test_runs_side_by_side_leave_what_runs_one_by_one_leave(tmp_path, monkeypatch, capsys):
    noise(tmp_path)
    told, pools = {}, []

    def pool(jobs: int, context: Any) -> ProcessPoolExecutor:
        pools.append(jobs)
        return ProcessPoolExecutor(jobs, context)

    monkeypatch.setattr("benchmarks.accuracy.__main__.ProcessPoolExecutor", pool)
    for jobs in "12":
        folder = tmp_path / jobs
        asked = ["accuracy", "run", "--setting", "resnet20", "--data", str(tmp_path), "--out", str(folder)]
        asked += ["--rows", str(folder / "rows"), "--epochs", "1", "--block", "0", "1", "--methods", "dense"]
        asked += ["--flops", "0.5", "0.3", "--jobs", jobs]
        monkeypatch.setattr(sys, "argv", asked)
        main()
        told[jobs] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("resnet20")]
    assert pools == [2]
    assert told["1"] == told["2"] and len(told["2"]) == 4  # dense training has no share: one run a block
    first, second = ({row["block"]: row["score"] for row in rows_in(tmp_path / jobs / "rows")} for jobs in "12")
    assert first == second and len(first) == 2
    monkeypatch.setattr("benchmarks.accuracy.blocks.slim_run", None)  # what has a row isn't run again
    monkeypatch.setattr(sys, "argv", [*asked[:-1], "1"])
    main()
