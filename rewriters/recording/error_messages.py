"""Explain what went wrong in a forward, with the line of the user's code."""

from __future__ import annotations

import os
import traceback
from pathlib import Path

import torch

from rewriters.errors import CaptureError
from rewriters.recording.real_results import ASKS_FOR_VALUES

_OWN_CODE = tuple(f"{folder}{os.sep}" for folder in (Path(torch.__file__).parent, Path(__file__).parents[1]))
"""Folders with a separator at the end: torchvision isn't in torch."""


def user_line(error: BaseException) -> str:
    """File, line and text of the user's code that is innermost in an exception's traceback."""
    frames = [
        frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith((*_OWN_CODE, "<"))
    ]
    return f"{frames[-1].filename}:{frames[-1].lineno}: {frames[-1].line}" if frames else ""


def _at(error: BaseException) -> str:
    line = user_line(error)
    return f", at {line}" if line else ""


def explain(error: Exception, where: str) -> CaptureError:
    """The error to raise for an exception in a forward."""
    if isinstance(error, ASKS_FOR_VALUES):
        return CaptureError(
            f"the forward depends on the values of a tensor{_at(error)}.",
            where=where,
            remedy="Put that part into a module of its own, which is then kept whole, or write it with torch.where.",
        )
    return CaptureError(
        f"the forward fails on the example inputs: {type(error).__name__}: {error}{_at(error)}.",
        where=where,
        remedy="Give example inputs of the shape, dtype and device that the model is run with.",
    )


def why_unrecordable(error: Exception) -> str:
    """Why a forward that runs on real tensors fails on fake ones."""
    asks = isinstance(error, ASKS_FOR_VALUES)
    text = str(error).strip().partition("\n")[0].rstrip(".")
    what = "the forward depends on the values of a tensor" if asks else f"{type(error).__name__}: {text}"
    return f"its forward can't be recorded: {what}{_at(error)}"
