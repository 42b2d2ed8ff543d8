"""Prepare holds Python's collector of garbage back, and leaves it as it was."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
import torch
from torch import nn

import autogate
from autogate.uncollected import uncollected


@pytest.fixture
def collections() -> Iterator[list[int]]:
    """Generations that are looked through from here on."""
    found: list[int] = []
    note = lambda phase, info: found.append(info["generation"]) if phase == "start" else None  # noqa: E731
    gc.callbacks.append(note)
    yield found
    gc.callbacks.remove(note)
    gc.enable()


def test_nothing_is_collected_inside_and_all_is_as_before_outside(collections):
    with uncollected():
        kept = [[] for _ in range(10 * gc.get_threshold()[0])]
        assert not collections and not gc.isenabled()
    assert gc.isenabled() and kept


def test_who_has_no_collector_has_none_afterwards(collections):
    gc.disable()
    with uncollected():
        pass
    assert not gc.isenabled()


def test_prepare_collects_nothing_while_it_looks_at_the_model(collections):
    seen = []

    class Watching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Conv2d(3, 4, 1), nn.Linear(4, 3)

        def forward(self, x):
            seen.append(gc.isenabled())
            return self.last(self.first(x).mean((2, 3)))

    autogate.prepare(Watching(), torch.zeros(2, 3, 8, 8))
    assert seen and not any(seen)
    assert gc.isenabled()


def test_a_prepare_that_fails_leaves_the_collector_running(collections):
    with pytest.raises(autogate.AutogateError):
        autogate.prepare(nn.Sequential(nn.Conv2d(3, 4, 1), nn.Linear(5, 3)), torch.zeros(2, 3, 8, 8))
    assert gc.isenabled()
