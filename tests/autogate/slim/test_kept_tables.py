"""Forwards that hold a size and keep a table for later calls: before prepare, with gates, and after finalize."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import autogate


class Positions(nn.Module):
    """Adds positions that it makes for each new length. Its halves make its forward one that is rewritten."""

    def __init__(self, absent: bool):
        super().__init__()
        self.a, self.b = nn.Conv1d(3, 16, 3, padding=1), nn.Conv1d(16, 16, 3, padding=1)
        self.out, self.absent = nn.Conv1d(16, 4, 1), absent
        if not absent:
            self.positions = None

    def forward(self, x):
        first, second = self.a(x).chunk(2, 1)
        there = hasattr(self, "positions") if self.absent else self.positions is not None
        if not there or self.positions.shape[-1] != x.shape[-1]:
            self.positions = torch.linspace(0, 1, x.shape[-1]).to(x)
        return self.out(self.b(torch.cat([second, first], 1)) + self.positions)


@pytest.mark.parametrize("absent", [False, True])
@pytest.mark.parametrize("ran", [False, True], ids=["new", "ran before"])
def test_a_table_that_is_made_at_another_time_changes_no_channels(absent, ran):
    model, x = Positions(absent).double().eval(), torch.randn(2, 3, 8).double()
    if ran:
        model(torch.randn(2, 3, 5).double())
    dense, table = copy.deepcopy(model), getattr(model, "positions", None)
    model = autogate.prepare(model, x, flops=0.5)
    assert getattr(model, "positions", None) is table
    lengths = [torch.randn(1, 3, length).double() for length in (8, 11, 8)]
    assert all(torch.equal(model(one), dense(one)) for one in lengths)
    autogate.close(model, "l1")
    gated = copy.deepcopy(model)
    slim = autogate.finalize(model, warn=False)
    assert slim.b.out_channels < 16
    for one in lengths:
        torch.testing.assert_close(slim(one), gated(one), rtol=1e-12, atol=1e-12)
