"""Hold Python's collector of garbage back where many objects are made and kept."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """Inside, unreachable cycles of objects aren't looked for.

    With PyTorch and timm imported such a search takes a quarter of a second; the graphs of a large model started one
    each time, and left it nothing to free.
    """
    running = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if running:
            gc.enable()
