"""Two checkouts measure models in turn, go on where they were, and are told in one table."""

from pathlib import Path

import pytest

from benchmarks import coverage_compare
from benchmarks.coverage_compare import document, run
from benchmarks.parts import lines

BENCHMARK = """
import argparse, json, os
parser = argparse.ArgumentParser()
parser.add_argument("--models", nargs="*"), parser.add_argument("--out"), parser.add_argument("--size")
args = parser.parse_args()
with open(args.out, "a") as out:
    for name in args.models:
        out.write(json.dumps({"model": name, "size": args.size, "by": "NAME"}) + "\\n")
with open(os.path.join(os.path.dirname(args.out), "turns"), "a") as turns:
    turns.write("NAME ")
"""
"""What stands for the coverage benchmark of a checkout."""


@pytest.fixture
def checkouts(tmp_path: Path) -> list[Path]:
    folders = [tmp_path / "old", tmp_path / "new"]
    for folder in folders:
        (folder / "benchmarks").mkdir(parents=True)
        (folder / "benchmarks" / "__init__.py").touch()
        (folder / "benchmarks" / "coverage.py").write_text(BENCHMARK.replace("NAME", folder.name))
    return folders


def test_each_checkout_runs_its_own_benchmark_in_turn_and_no_model_twice(tmp_path, checkouts, monkeypatch):
    monkeypatch.setattr(coverage_compare, "AT_A_TIME", 2)
    run(checkouts, ["a", "b"], tmp_path, ["--size", "96"])
    run(checkouts, ["a", "b", "c"], tmp_path, ["--size", "96"])
    for side, by in (("before", "old"), ("after", "new")):
        assert lines(tmp_path / f"{side}.jsonl") == [{"model": name, "size": "96", "by": by} for name in "abc"]
    assert sorted((tmp_path / "turns").read_text().split()) == ["new", "new", "old", "old"]


def line(model: str, **fields) -> dict:
    wanted = {"step": "", "error": "", "difference": 1e-7, "double_difference": None, "reach": 1.0, "left": 0.25}
    return {"model": model, "family": f"{model}s", "prepare_s": 1.0, **wanted, **fields}


def test_the_table_has_both_and_the_ratio_of_times():
    before = [line("a"), line("b", prepare_s=2.0, reach=0.9), line("c", prepare_s=4.0)]
    after = [line("c", prepare_s=2.0), line("b", prepare_s=3.0), line("a", step="time", difference=None), line("new")]
    text = document(before, after)
    assert "| models | 3 | 3 |" in text and "| exact | 3 | 2 |" in text
    assert "| of these, times before: median, most |  | 1.00, 1.50 |" in text
    assert "| as | a | yes, no: time | 100.0% | 0.250 | 1.0, 1.0 | 1.00 |" in text
    assert "| bs | b | yes | 90.0%, 100.0% | 0.250 | 2.0, 3.0 | 1.50 |" in text
    assert "new" not in text
