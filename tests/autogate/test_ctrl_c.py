"""Ctrl-C within a verb leaves the model as it was or the work done, and PyTorch as it was."""

from __future__ import annotations

import pytest

from benchmarks.interrupts import counts


@pytest.mark.parametrize("verb", ["prepare", "finalize", "load"])
def test_nothing_is_broken(verb: str):
    found = counts(verb, 12)  # how many come before the work is done depends on the machine
    assert found["as it was"] + found["done and whole"] == 12
