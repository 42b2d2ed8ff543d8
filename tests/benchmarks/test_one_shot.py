"""The benchmark of criteria: distillation, and rows that an interrupted run goes on from."""

from __future__ import annotations

import copy
import json
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from benchmarks.accuracy.models import MODELS
from benchmarks.one_shot.__main__ import main
from benchmarks.one_shot.distillation import Distillation, distilled
from benchmarks.one_shot.networks import NETWORKS, Subject
from tests.autogate.criteria.nets import IMAGES, LABELS, chain


def subject() -> Subject:
    """A small network, which has to learn from images that are stored as bytes."""
    stored = torch.randint(0, 255, (32, *IMAGES.shape[1:]), generator=torch.Generator().manual_seed(0))
    return Subject(
        chain(), [IMAGES], [(IMAGES, LABELS)], "11", stored.to(torch.uint8), lambda images: images.float() / 128 - 1
    )


def test_a_student_learns_what_its_teacher_says_without_labels():
    of, student = subject(), chain()
    with torch.no_grad():
        of.model[11].weight.mul_(100)  # so that it says something
    images = of.ready(of.unlabelled)

    def distance() -> float:
        with torch.no_grad():
            said = F.log_softmax(student.eval()(images), 1)
            return float(F.kl_div(said, of.model.eval()(images).softmax(1), reduction="batchmean"))

    before, teacher = distance(), copy.deepcopy(of.model.state_dict())
    distilled(student, of, Distillation(steps=60, batch=16, lr=0.01))
    assert distance() < before / 3
    assert all(torch.equal(now, teacher[name]) for name, now in of.model.state_dict().items())


@pytest.mark.parametrize("norms", [True, False])
def test_statistics_of_norms_are_kept_if_asked(norms):
    of, student = subject(), chain()
    before = copy.deepcopy(dict(student.named_buffers()))
    distilled(student, of, Distillation(steps=2, batch=4, norms=norms))
    assert norms != all(torch.equal(now, before[name]) for name, now in student.named_buffers())


def test_images_are_of_all_classes_though_files_are_sorted(tmp_path):
    labels = np.arange(2000) // 200
    images = np.broadcast_to(labels[:, None, None, None].astype(np.uint8), (2000, 4, 4, 3))
    for split in ("train", "test"):
        np.savez(tmp_path / f"{split}.npz", images=images, labels=labels)
    torch.save(MODELS["resnet20"]().state_dict(), tmp_path / "weights.pt")
    of = NETWORKS["resnet20"](tmp_path / "weights.pt", tmp_path, 100)
    assert len(torch.cat([labels for _, labels in of.calibration]).unique()) == 10
    assert len(torch.cat(of.images)[:, 0, 0, 0].unique()) == 10


def test_a_run_goes_on_where_it_ended(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(NETWORKS, "lite0", lambda *_: subject())
    out = tmp_path / "rows.jsonl"
    words = [
        "one_shot", "run", "--network", "lite0", "--weights", "w", "--cifar", "c", "--out", str(out),
        "--flops", "0.7", "--steps", "2", "--batch", "4",
    ]  # fmt: skip
    for methods in (["l1, uniform"], ["l1, uniform", "torch-pruning L1"]):
        monkeypatch.setattr("sys.argv", [*words, "--methods", *methods])
        main()
    first, second = map(json.loads, out.read_text().splitlines())
    assert (first["method"], second["method"]) == ("l1, uniform", "torch-pruning L1")
    assert first["flops_left"] == pytest.approx(0.7, abs=0.06) and 0 <= first["compensated"] <= 100
    assert all((row["steps"], row["batch"]) == (2, 4) and 0 <= row["distilled"] <= 100 for row in (first, second))
    capsys.readouterr()
    monkeypatch.setattr("sys.argv", ["one_shot", "table", "--out", str(out)])
    main()
    cells = re.findall(r"\| torch-pruning L1 \| ([\d.]+) / ([\d.]+) / – / ([\d.]+) \|", capsys.readouterr().out)
    assert cells == [tuple(f"{second[form]:.1f}" for form in ("closed", "recalibrated", "distilled"))]
    monkeypatch.setattr("sys.argv", ["one_shot", "figure", "--out", str(out), "--svg", str(tmp_path / "one_shot.svg")])
    main()
    assert "<svg" in (tmp_path / "one_shot.svg").read_text()


def test_cells_that_say_least_come_last(tmp_path, monkeypatch):
    monkeypatch.setitem(NETWORKS, "lite0", lambda *_: subject())
    done = []
    monkeypatch.setattr("benchmarks.one_shot.__main__.measure", lambda *given: done.append(given[2:4]) or {})
    words = ["one_shot", "run", "--network", "lite0", "--weights", "w", "--cifar", "c", "--out", str(tmp_path / "o")]
    monkeypatch.setattr("sys.argv", [*words, "--methods", "l1, uniform", "l1, global", "--flops", "0.9", "0.7"])
    main()
    assert done == [("l1, global", 0.9), ("l1, global", 0.7), ("l1, uniform", 0.9), ("l1, uniform", 0.7)]
