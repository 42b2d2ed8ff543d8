"""Break-even: where gathering channels costs as much as computing all of them."""

from types import SimpleNamespace

import pytest
import torch

from autogate.skipping import timing
from autogate.skipping.break_even import BreakEven


@pytest.mark.parametrize(
    ("overhead", "column", "sides", "wanted"),
    [
        (0.0, 0.0, "both", BreakEven(0.875, 0.875)),
        (0.3, 0.2, "both", BreakEven(0.625, 0.5)),
        (0.3, 9.0, "both", BreakEven(0.625, 0.0)),
        (0.3, 0.0, "rows", BreakEven(0.625, 0.0)),
        (9.0, 0.0, "both", BreakEven(0.0, 0.0)),
        (0.3, 0.2, "columns", BreakEven(0.375, 0.375)),
    ],
)
def test_break_even_is_where_gathering_is_no_faster(monkeypatch, overhead, column, sides, wanted):
    def trial(input, on, read):
        return 1.0 if on == read == 1 else on * read + overhead + (column if read < 1 else 0)

    monkeypatch.setattr(timing, "_seconds", lambda call: call())
    forward = SimpleNamespace(trial=trial, rows=sides != "columns", columns=sides != "rows")
    assert timing.measured(forward, torch.zeros(1)) == wanted
