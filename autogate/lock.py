"""What holds around every verb: one model at a time, Ctrl-C where it is safe, random number generators as they were.

Only one model is analysed or rewritten at a time, because PyTorch is patched meanwhile, for all threads. A verb draws
random numbers (example inputs, weights of the dense model, layers to time), more of them if a cache is empty. The
caller doesn't see that: the same seed gives the same run, with autogate's calls in it or without.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

from rewriters.interrupts import signals_held
from rewriters.recording import random_numbers_kept

P = ParamSpec("P")
R = TypeVar("R")

_LOCK = threading.RLock()


def locked(function: Callable[P, R]) -> Callable[P, R]:
    """Make calls from several threads wait for each other; hold back Ctrl-C until it is safe; keep random numbers.

    Within `torch.inference_mode` they run as outside of it: parameters made in inference mode could not be trained.
    """

    @functools.wraps(function)
    def one_at_a_time(*args: P.args, **kwargs: P.kwargs) -> R:
        inferring = torch.is_inference_mode_enabled()
        with (
            _LOCK,
            signals_held(),
            torch.inference_mode(False) if inferring else contextlib.nullcontext(),
            random_numbers_kept(_cuda_devices()),
        ):
            return function(*args, **kwargs)

    return one_at_a_time


def _cuda_devices() -> list[torch.device]:
    """All CUDA devices, once CUDA is in use."""
    count = torch.cuda.device_count() if torch.cuda.is_initialized() else 0
    return [torch.device("cuda", index) for index in range(count)]
