"""Keep Python's garbage collector away from objects that existed before.

The graphs of a trial are reference cycles, which stay until a collection. Inside `frozen_heap` a collection looks
through new objects only, so it can be called whenever a trial is done.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator

_within = 0
"""How many `frozen_heap` contexts are open: `gc.get_freeze_count` would count the frozen objects one by one."""


@contextlib.contextmanager
def frozen_heap() -> Iterator[None]:
    """Inside, garbage collection looks through new objects only.

    With PyTorch and timm imported, a collection of all objects takes a quarter of a second, and the graphs of a large
    model trigger one each time. A heap that the caller has frozen (`gc.freeze`, before a fork) is left as it is.
    """
    global _within
    frozen_before = _within > 0 or gc.get_freeze_count() > 0
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
    """Inside `frozen_heap`, free the graphs that were made for a trial; elsewhere, do nothing.

    They are reference cycles, which would stay until Python's next collection.
    """
    if _within:
        gc.collect()
