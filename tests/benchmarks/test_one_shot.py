"""The benchmark of criteria: compensation, and rows that an interrupted run goes on from."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import Tensor, nn

import autogate
from benchmarks.one_shot.__main__ import main
from benchmarks.one_shot.compensation import compensated, regression
from benchmarks.one_shot.networks import NETWORKS, Subject
from rewriters import Side
from tests.autogate.criteria.nets import IMAGES, LABELS, chain


def test_what_live_channels_determine_is_predicted():
    live = torch.randn(200, 3)
    wanted = live @ torch.tensor([[1.0, 0, 0, 2], [0, 1, 0, -1], [0, 0, 1, 0]]) + torch.tensor([0.0, 0, 0, 5])
    taken, constant = regression(live, wanted)
    assert torch.allclose(live @ taken + constant, wanted, atol=2e-3)


class Twins(nn.Module):
    """Two layers behind another whose last channels are multiples of the first, and shifted."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 4, 1), nn.Linear(4, 2)
        with torch.no_grad():
            self.first.weight[3:] = -2 * self.first.weight[:3]
            self.first.bias[3:] = 1.0

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.second(self.first(x)).relu().mean((2, 3)))


def test_a_channel_that_others_determine_is_compensated():
    model = Twins()
    wanted = model(IMAGES)
    dense = autogate.prepare(copy.deepcopy(model), IMAGES)
    closed = autogate.prepare(model, IMAGES)
    bank = autogate.gates(closed)
    bank.close(bank.channel_map.classes[Side("first.weight", 0)][3:])
    assert not torch.allclose(closed(IMAGES), wanted, atol=1e-2)
    assert torch.allclose(compensated(closed, dense, IMAGES, stride=1)(IMAGES), wanted, atol=1e-3)


def test_a_run_goes_on_where_it_ended(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(NETWORKS, "lite0", lambda *_: Subject(chain(), [IMAGES], [(IMAGES, LABELS)], "11"))
    out = tmp_path / "rows.jsonl"
    words = [
        "one_shot",
        "run",
        "--network",
        "lite0",
        "--weights",
        "w",
        "--cifar",
        "c",
        "--out",
        str(out),
        "--flops",
        "0.7",
    ]
    for methods in (["l1, uniform"], ["l1, uniform", "torch-pruning L1"]):
        monkeypatch.setattr("sys.argv", [*words, "--methods", *methods])
        main()
    first, second = map(json.loads, out.read_text().splitlines())
    assert (first["method"], second["method"]) == ("l1, uniform", "torch-pruning L1")
    assert first["flops_left"] == pytest.approx(0.7, abs=0.06) and 0 <= first["compensated"] <= 100
    capsys.readouterr()
    monkeypatch.setattr("sys.argv", ["one_shot", "table", "--out", str(out)])
    main()
    assert "| torch-pruning L1 |" in capsys.readouterr().out
