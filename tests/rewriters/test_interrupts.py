"""Signals are held back until a point where stopping is safe."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from rewriters import interrupts
from rewriters.interrupts import let_signals_in, signals_held


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    own = signal.signal(signal.SIGINT, signal.default_int_handler)  # a process in the background may ignore it
    before = {number: signal.getsignal(number) for number in signal.valid_signals()}
    yield
    assert {number: signal.getsignal(number) for number in signal.valid_signals()} == before
    signal.signal(signal.SIGINT, own)
    assert not interrupts._waiting


def ctrl_c() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def test_ctrl_c_waits_for_the_next_safe_point():
    done: list[int] = []
    with pytest.raises(KeyboardInterrupt), signals_held():
        let_signals_in()
        ctrl_c()
        done.append(1)
        let_signals_in()
        done.append(2)
    assert done == [1]


def test_ctrl_c_comes_at_the_end_at_the_latest():
    done: list[int] = []
    with pytest.raises(KeyboardInterrupt):
        with signals_held():
            with signals_held():
                ctrl_c()
            done.append(1)
        done.append(2)
    assert done == [1]


def test_a_second_ctrl_c_does_not_wait():
    with pytest.raises(KeyboardInterrupt), signals_held():
        ctrl_c()
        try:
            ctrl_c()
        finally:
            assert not interrupts._waiting


def test_an_error_does_not_swallow_it():
    with pytest.raises(KeyboardInterrupt) as caught, signals_held():
        ctrl_c()
        raise ValueError
    assert isinstance(caught.value.__context__, ValueError)


def test_handlers_of_the_callers_run_once_and_others_stay_the_systems():
    got: list[Any] = []
    before = signal.signal(signal.SIGUSR1, lambda number, frame: got.append(number))
    system = signal.getsignal(signal.SIGTERM)
    try:
        with signals_held():
            os.kill(os.getpid(), signal.SIGUSR1)
            assert got == [] and signal.getsignal(signal.SIGTERM) == system
            let_signals_in()
            assert got == [signal.SIGUSR1]
        assert got == [signal.SIGUSR1]
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_other_threads_hold_nothing():
    found: list[Any] = []

    def run() -> None:
        with signals_held():
            let_signals_in()
            found.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == [signal.getsignal(signal.SIGINT)]
