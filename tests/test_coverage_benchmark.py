"""The benchmark over all models gives each a line, and the page that is written tells of it."""

from benchmarks import coverage, coverage_table
from benchmarks.parts import LEAST_SPREAD, lines


def test_a_model_gets_one_line_which_tells_that_it_is_exact(tmp_path, monkeypatch):
    out, page = tmp_path / "found.jsonl", tmp_path / "coverage.md"
    monkeypatch.setattr("sys.argv", ["coverage", "--models", "test_resnet", "--out", str(out)])
    coverage.main()
    coverage.main()  # a model that the file has is passed over
    (line,) = lines(out)
    assert (line["model"], line["step"], line["error"]) == ("test_resnet", "", "")
    assert coverage_table.exact(line) and line["spread"] > LEAST_SPREAD
    assert line["reach"] == 1 and 0.2 < line["left"] < 0.3  # half of the classes, on both sides of most layers
    monkeypatch.setattr("sys.argv", ["coverage_table", str(out), "--out", str(page)])
    coverage_table.main()
    assert "| resnet | 1 | 1 | 100.0% |" in page.read_text()
