"""Attributes in which forwards keep tensors for later calls."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from rewriters import UndoLog
from rewriters.recording import Kept, capture, forget, kept_before, remember


class Table(nn.Module):
    """Keeps a table of positions and its length, makes both again for longer inputs, and needs a tensor of its own."""

    def __init__(self, absent: bool):
        super().__init__()
        self.absent, self.scale, self.ready = absent, torch.tensor(2.0), 0
        if not absent:
            self.table = None

    def forward(self, x):
        there = hasattr(self, "table") if self.absent else self.table is not None
        if not there or len(self.table) < x.shape[-1]:
            self.table, self.ready = torch.arange(x.shape[-1]).to(x), x.shape[-1]
        return x + self.scale * self.table[: x.shape[-1]]


class Uses(nn.Module):
    def __init__(self, absent: bool):
        super().__init__()
        self.inner = Table(absent)

    def forward(self, x):
        return self.inner(x)


@pytest.mark.parametrize("absent", [False, True])
def test_what_a_forward_sets_is_told_and_taken_back(absent):
    model = Uses(absent)
    captured = capture(model, (torch.randn(2, 3, 5),))
    assert captured.kept == (Kept("inner", "ready", False, 0), Kept("inner", "table", absent))
    assert getattr(model.inner, "table", None) is None


@pytest.mark.parametrize("absent", [False, True])
def test_what_earlier_calls_left_is_found_and_can_be_set_aside(absent):
    model, x = Uses(absent), torch.randn(2, 3, 5)
    wanted = model(x)
    found = kept_before(model, (x,), {})
    assert found == (Kept("inner", "table", absent),)
    table, undo_log = model.inner.table, UndoLog()
    values = forget(model, found, undo_log)
    assert getattr(model.inner, "table", None) is None and hasattr(model.inner, "table") is not absent
    remember(model, values, undo_log)
    assert model.inner.table is table and torch.equal(model(x), wanted)
    forget(model, found, undo_log)
    undo_log.undo()
    assert model.inner.table is table


def test_a_tensor_that_the_forward_only_reads_is_not_found():
    model = Uses(False)
    assert kept_before(model, (torch.randn(2, 3, 5),), {}) == ()
    assert model.inner.scale == 2
