"""The benchmark over all models writes a line for each, and the page from the lines."""

from pathlib import Path

import pytest

from benchmarks import coverage, coverage_table
from benchmarks.parts import LEAST_SPREAD, lines


def measured(monkeypatch: pytest.MonkeyPatch, out: Path, *options: str) -> dict:
    """The line of test_resnet, which a second run passes over."""
    monkeypatch.setattr("sys.argv", ["coverage", "--models", "test_resnet", "--out", str(out), *options])
    coverage.main()
    coverage.main()
    (line,) = lines(out)
    return line


@pytest.mark.slow
def test_a_model_gets_one_line_which_tells_that_it_is_exact(tmp_path, monkeypatch):
    ours, theirs, page = tmp_path / "ours.jsonl", tmp_path / "theirs.jsonl", tmp_path / "coverage.md"
    line = measured(monkeypatch, ours)
    assert (line["model"], line["step"], line["error"]) == ("test_resnet", "", "")
    assert coverage_table.exact(line) and line["spread"] > LEAST_SPREAD
    assert line["reach"] == 1 and 0.2 < line["left"] < 0.3  # half of the classes, on both sides of most layers
    peer = measured(monkeypatch, theirs, "--method", "torch-pruning")["peer"]
    assert peer["error"] == "" and peer["seconds"] > 0 and peer["prepare_s"] > 0
    monkeypatch.setattr("sys.argv", ["coverage_table", str(ours), str(theirs), "--out", str(page)])
    coverage_table.main()
    assert "| resnet | 1 | 1 | 100.0% |" in page.read_text()
    assert "| slim model runs | 1 | 1 |" in page.read_text()


@pytest.mark.slow
def test_a_model_that_was_prepared_again_stays_exact(tmp_path, monkeypatch):
    whole = measured(monkeypatch, tmp_path / "whole.jsonl")
    prepared = measured(monkeypatch, tmp_path / "prepared.jsonl", "--method", "prepare")
    assert prepared["step"] == "" and prepared["difference"] is None
    assert prepared["reach"] == 1 and prepared["prepare_bytes"] > 0
    (line,) = coverage_table.joined([whole | {"prepare_s": -1.0}, prepared])
    assert coverage_table.exact(line) and line["prepare_s"] == prepared["prepare_s"] > 0
    (line,) = coverage_table.joined([prepared])
    assert not coverage_table.exact(line)
    assert "Not done" not in coverage_table.document([line], [], [])
    (line,) = coverage_table.joined([whole, prepared, prepared | {"step": "finalize", "error": "broken"}])
    assert not coverage_table.exact(line)
    assert "broken" in coverage_table.document([line], [], [])


@pytest.mark.parametrize(
    ("difference", "double", "is_exact"),
    [(1e-6, None, True), (1e-4, None, False), (1e-4, 0.0, True), (1e-4, 1e-12, True), (1e-4, 1e-8, False)],
)
def test_where_float32_rounds_by_more_float64_decides(difference, double, is_exact):
    line = {"step": "", "difference": difference, "double_difference": double}
    assert coverage_table.exact(line) == is_exact
