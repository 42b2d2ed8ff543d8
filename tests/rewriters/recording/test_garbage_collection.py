"""Prepare keeps the garbage collector off older objects, and restores its state."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator

import pytest
import torch
from torch import nn

import autogate
from rewriters.recording.garbage_collection import collect, frozen_heap


class Cycle:
    """Only a search finds it when nobody holds it any more."""

    def __init__(self) -> None:
        self.itself = self


@pytest.fixture(autouse=True)
def thawed() -> Iterator[None]:
    gc.unfreeze()
    yield
    gc.unfreeze()


def test_inside_only_new_cycles_are_found():
    old = Cycle()
    before = weakref.ref(old)
    with frozen_heap():
        del old
        new = weakref.ref(Cycle())
        gc.collect()
        assert new() is None and before() is not None
    gc.collect()
    assert before() is None


def test_cycles_are_collected_inside_and_not_outside():
    gc.disable()
    try:
        new = weakref.ref(Cycle())
        collect()
        assert new() is not None
        with pytest.raises(ZeroDivisionError), frozen_heap():
            newer = weakref.ref(Cycle())
            collect()
            assert newer() is None and new() is not None
            raise ZeroDivisionError
        collect()
        assert new() is not None
    finally:
        gc.enable()


def test_a_heap_that_was_frozen_before_stays_so():
    gc.freeze()
    with frozen_heap():
        pass
    assert gc.get_freeze_count()


def test_within_another_one_frozen_objects_are_not_counted(monkeypatch):
    with frozen_heap():
        monkeypatch.setattr(gc, "get_freeze_count", lambda: pytest.fail("this takes as long as a recording"))
        with frozen_heap():
            pass
        monkeypatch.undo()
        assert gc.get_freeze_count()
    assert not gc.get_freeze_count()


def test_prepare_looks_at_the_model_with_a_frozen_heap():
    seen = []

    class Watching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Conv2d(3, 4, 1), nn.Linear(4, 3)

        def forward(self, x):
            seen.append(gc.get_freeze_count())
            return self.last(self.first(x).mean((2, 3)))

    autogate.prepare(Watching(), torch.zeros(2, 3, 8, 8))
    assert seen and all(seen)
    assert not gc.get_freeze_count()


def test_a_prepare_that_fails_thaws_the_heap():
    with pytest.raises(autogate.AutogateError):
        autogate.prepare(nn.Sequential(nn.Conv2d(3, 4, 1), nn.Linear(5, 3)), torch.zeros(2, 3, 8, 8))
    assert not gc.get_freeze_count()
