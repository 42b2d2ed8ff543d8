"""One model at a time is looked at: PyTorch is patched meanwhile, for every thread."""

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
    """Let calls from several threads wait for each other.

    Inside of `torch.inference_mode` they run as outside: parameters that were made in it could not be trained.
    """

    @functools.wraps(function)
    def one_at_a_time(*args: P.args, **kwargs: P.kwargs) -> R:
        inferring = torch.is_inference_mode_enabled()
        with _LOCK, torch.inference_mode(False) if inferring else contextlib.nullcontext():
            return function(*args, **kwargs)

    return one_at_a_time
