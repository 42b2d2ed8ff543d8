"""A lock: only one model is analysed or rewritten at a time, because PyTorch is patched meanwhile, for all threads."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")

_LOCK = threading.RLock()


def locked(function: Callable[P, R]) -> Callable[P, R]:
    """Make calls from several threads wait for each other.

    Within `torch.inference_mode` they run as outside of it: parameters made in inference mode could not be trained.
    """

    @functools.wraps(function)
    def one_at_a_time(*args: P.args, **kwargs: P.kwargs) -> R:
        inferring = torch.is_inference_mode_enabled()
        with _LOCK, torch.inference_mode(False) if inferring else contextlib.nullcontext():
            return function(*args, **kwargs)

    return one_at_a_time
