"""Hold back signals such as Ctrl-C while a model is being changed, until a point where stopping is safe.

Python runs a signal's handler between any two instructions, and Ctrl-C's raises KeyboardInterrupt there: between a
patch and the `try` that would remove it, or in the clean-up itself. PyTorch would then stay patched. Inside of
`signals_held`, handlers wait for the next `let_signals_in`, which long work calls between its parts.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

Handler = Callable[[int, FrameType | None], Any]

_waiting: dict[int, Handler] = {}
"""The handlers of the signals that have come, by the signals' number."""


@contextlib.contextmanager
def signals_held() -> Iterator[None]:
    """Inside, a signal's Python handler waits for the next `let_signals_in`, or for the end.

    A signal that comes a second time while it waits is let in at once, for someone who can't wait. Python runs handlers
    in the main thread only, so other threads have nothing to hold back.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before: dict[signal.Signals, Handler] = {}
    try:
        # Ctrl-C is the first to be held and the last to be let go: the others are then restored without it.
        for number in sorted(signal.valid_signals(), key=lambda number: number != signal.SIGINT):
            handler = signal.getsignal(number)
            if callable(handler) and not isinstance(handler, _Held):  # neither the system's nor held already
                before[signal.Signals(number)] = handler
                signal.signal(number, _Held(handler))
        yield
    finally:
        for number, handler in reversed(before.items()):
            signal.signal(number, handler)
        if before:
            let_signals_in()


class _Held:
    """Notes a signal instead of handling it."""

    def __init__(self, handler: Handler) -> None:
        self._handler = handler

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if number in _waiting:
            del _waiting[number]
            self._handler(number, frame)
        else:
            _waiting[number] = self._handler


def let_signals_in() -> None:
    """Run the handlers that wait; Ctrl-C's raises KeyboardInterrupt. All that is open can be closed as usual here."""
    if _waiting and threading.current_thread() is threading.main_thread():
        number = next(iter(_waiting))
        _waiting.pop(number)(number, None)
        let_signals_in()
