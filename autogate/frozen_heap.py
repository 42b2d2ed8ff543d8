"""Spare Python's collector of garbage what was there before."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def frozen_heap() -> Iterator[None]:
    """Inside, unreachable cycles are looked for among new objects alone.

    With PyTorch and timm imported a search through all takes a quarter of a second, and the graphs of a large model
    start one each time. Who has frozen a heap already (`gc.freeze`, before a fork) keeps it as it is.
    """
    if gc.get_freeze_count():
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
