"""Notice which forwards ask whether they train, so that what they do in train mode isn't overlooked, and which write.

While a forward is recorded, `training` is a property of `nn.Module`, which notes the module call that is running.
Reads by torch's own code don't count, nor do those of layers that `set_train_mode` leaves in eval mode.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

from torch import nn

from rewriters.recording.side_effects import KNOWN_IN_TRAIN_MODE


@contextlib.contextmanager
def mode_reads(note: Callable[[], None]) -> Iterator[None]:
    """Inside, `note` is called when code that isn't torch's reads the mode of a module."""

    def read(module: nn.Module) -> Any:
        asker = sys._getframe(1).f_globals.get("__name__", "")
        if not asker.startswith("torch.") and not isinstance(module, KNOWN_IN_TRAIN_MODE):
            note()
        try:
            return module.__dict__["training"]
        except KeyError:  # torch.jit keeps it elsewhere: Python asks `__getattr__` next
            raise AttributeError("training") from None

    def write(module: nn.Module, mode: Any) -> None:
        module.__dict__["training"] = mode

    with mock.patch.object(nn.Module, "training", property(read, write), create=True):
        yield


@contextlib.contextmanager
def attribute_writes(note: Callable[[nn.Module], None]) -> Iterator[None]:
    """Inside, `note` is called with each module on which an attribute is set."""
    plain_write = nn.Module.__setattr__

    def write(module: nn.Module, name: str, value: Any) -> None:
        note(module)
        plain_write(module, name, value)

    with mock.patch.object(nn.Module, "__setattr__", write):
        yield
