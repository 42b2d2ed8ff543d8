"""The benchmark of models that choose their channels for each image writes a line for each model, and a table."""

from pathlib import Path

import pytest
import torch

from benchmarks import adaptive_coverage
from benchmarks.adaptive_time import widest_gap
from benchmarks.parts import lines


@pytest.mark.slow
def test_a_model_gets_one_line_which_tells_that_it_is_exact(tmp_path, monkeypatch, capsys):
    out: Path = tmp_path / "adaptive.jsonl"
    monkeypatch.setattr(
        "sys.argv", ["adaptive_coverage", "--models", "resnet18", "mixer_s32_224", "--out", str(out)]
    )  # fmt: skip
    adaptive_coverage.main()
    adaptive_coverage.main()
    line, other = sorted(lines(out), key=lambda row: row["step"])
    assert adaptive_coverage.exact(line) and line["chosen"] == 19 and line["fixed"] < line["cost"] < 0.9
    assert other["step"] == adaptive_coverage.OTHER
    assert "2 models, one of each file; in 1 most" in adaptive_coverage.table(lines(out))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({}, ""),
        ({"four": 1e-3, "double": 1e-12}, ""),
        ({"four": 1e-3, "double": 1e-3}, "| net | done | outputs differ by 1e-03, in float64 by 1e-03 |"),
        ({"step": "prepare", "error": "a | b"}, "| net | prepare | a \\| b |"),
    ],
)
def test_what_is_not_exact_gets_a_row(change, told):
    row = {"model": "net", "step": "done", "one": 1e-7, "four": 1e-6, "double": None, "error": ""} | change
    text = adaptive_coverage.table([row])
    assert (told in text) if told else "|" not in text


def test_codes_change_far_from_all_scores():
    scores = torch.linspace(0, 1, 1001, dtype=torch.float64) ** 2
    found = widest_gap(scores, 0.6)
    assert abs(float((scores < found).double().mean()) - 0.6) < 0.03
    assert (scores - found).abs().min() > 5e-4
