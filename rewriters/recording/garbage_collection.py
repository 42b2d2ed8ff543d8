"""Spare Python's collector of garbage what was there before."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator

_within = 0
"""How many times `frozen_heap` has been entered and not left."""


@contextlib.contextmanager
def frozen_heap() -> Iterator[None]:
    """Inside, unreachable cycles are looked for among new objects alone.

    With PyTorch and timm imported a search through all takes a quarter of a second, and the graphs of a large model
    start one each time. Who has frozen a heap already (`gc.freeze`, before a fork) keeps it as it is.
    """
    global _within
    frozen_before = gc.get_freeze_count() > 0
    if not frozen_before:
        gc.freeze()
    _within += 1
    try:
        yield
    finally:
        _within -= 1
        if not frozen_before:
            gc.unfreeze()


def collect() -> None:
    """Inside of `frozen_heap`, free what is unreachable now: graphs that were made for a trial.

    They are cycles, which would stay until Python looks for some the next time.
    """
    if _within:  # Python counts frozen objects one by one
        gc.collect()
