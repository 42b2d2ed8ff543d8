"""Several widths in one network beside networks of these widths: blocks that go on, and differences within them."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from benchmarks.accuracy.blocks import dense_network
from benchmarks.accuracy.data import Data
from benchmarks.accuracy.models import ResNet
from benchmarks.accuracy.setting import Recipe
from benchmarks.accuracy.settings import CIFAR
from benchmarks.accuracy.subnets import BETWEEN, Block, run_block
from benchmarks.accuracy.subnets_table import FULL, SHARES, STRUCTURES, UNIFORM, figure, table

pytestmark = pytest.mark.filterwarnings("ignore")


def block(folder) -> Block:
    """A ResNet-8 that was trained for an epoch on images of noise."""
    data = Data(torch.randint(0, 255, (32, 3, 32, 32), dtype=torch.uint8), torch.randint(10, (32,)))
    setting = replace(CIFAR["resnet20"], network=lambda _: ResNet(8), recipe=Recipe(epochs=2, dense_epochs=1, batch=4))
    return Block(dense_network("resnet8", 0, setting, data, data, folder), setting, data, data, 0)


@pytest.mark.slow
def test_a_block_that_was_interrupted_goes_on(tmp_path):
    torch.manual_seed(0)
    one, rows = block(tmp_path), tmp_path / "rows.jsonl"
    run_block(one, tmp_path, rows)
    lines = rows.read_text().splitlines()
    found = [json.loads(line) for line in lines]
    assert len(found) == 1 + len(STRUCTURES) * (len(SHARES) + 2 * (len(SHARES) + 1 + BETWEEN))
    for row in found:
        wanted = 1.0 if row["subnet"] == FULL else None if row["subnet"] is None else float(row["subnet"])
        assert wanted is None or row["flops_left"] == pytest.approx(wanted, abs=0.1)
        assert 0 <= row["score"] <= 100
    rows.write_text("\n".join(lines[:-1]) + "\n")
    run_block(one, tmp_path, rows)
    assert rows.read_text().splitlines() == lines
    run_block(one, tmp_path, rows)
    assert rows.read_text().splitlines() == lines


def row(block: str, structures: str, training: str, subnet: str | None, score: float) -> str:
    circumstances = {"epochs": 2, "dense_epochs": 1, "batch": 8, "peak": 0.1, "samples": 32, "test_samples": 32}
    return json.dumps(
        {
            "block": block, "structures": structures, "training": training, "subnet": subnet, "flops_left": 0.2,
            "score": score, "dense_score": 80.0, **circumstances,
        }
    )  # fmt: skip


def test_differences_are_those_within_blocks(tmp_path, capsys):
    rows = tmp_path / "rows.jsonl"
    lines = [
        row("a", "clipped Lasso", "alone", "0.22", 60.0), row("a", "clipped Lasso", "sandwich", "0.22", 63.0),
        row("b", "clipped Lasso", "alone", "0.22", 70.0), row("b", "clipped Lasso", "sandwich", "0.22", 71.0),
        row("b", UNIFORM, "sandwich", "0.22", 66.0), row("a", "clipped Lasso", "sandwich", None, 61.0),
        row("a", UNIFORM, "alone", FULL, 82.0), row("a", "group Lasso", "together", FULL, 81.0),
    ]  # fmt: skip
    rows.write_text("\n".join(lines))
    table(rows)
    told = capsys.readouterr().out.splitlines()
    assert "2 blocks, dense 80.00 %" in told[1]
    assert "| clipped Lasso | 0.22 | 0.200 | 65.00 |  |  | 67.00 | +2.00 ± 1.00 | +5.00 |" in told
    assert "| group Lasso | full | 0.200 | 82.00 | 81.00 | -1.00 |  |  |  |" in told
    figure(rows, tmp_path / "drawn.svg")
    assert "clipped Lasso, one network" in (tmp_path / "drawn.svg").read_text()
