"""Batches joined into one, so that a model reads all samples layer by layer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from rewriters import AutogateError

SAMPLES = 256
"""No more batches are taken once there are so many samples."""


def joined(batches: Iterable[Any]) -> Any:
    """The inputs of the first batches as those of one batch: a tensor, or a mapping of keyword arguments.

    Args:
        batches: as for `autogate.close`.

    Raises:
        AutogateError: there are none, or their tensors differ in more than the first dimension.
    """
    taken: list[Mapping[str, Any]] = []
    samples, alone = 0, True
    for batch in batches:
        inputs = batch[0] if isinstance(batch, (tuple, list)) else batch
        alone = not isinstance(inputs, Mapping)
        taken.append({"": inputs} if alone else inputs)
        samples += next((len(x) for x in taken[-1].values() if isinstance(x, Tensor) and x.ndim), 0)
        if samples >= SAMPLES:
            break
    if not taken:
        raise AutogateError("`batches` yields none.", where="close", remedy="Pass a list or a loader, not yet used.")
    whole = {name: _joined([inputs.get(name) for inputs in taken], name) for name in taken[0]}
    return whole[""] if alone else whole


def _joined(values: list[Any], name: str) -> Any:
    if not all(isinstance(value, Tensor) and value.ndim for value in values):
        return values[0]
    if len({value.shape[1:] for value in values}) > 1:
        raise AutogateError(
            f"batches can't be joined: {name or 'inputs'} of shapes {sorted({tuple(x.shape) for x in values})}.",
            where="close",
            remedy="With compensate=True, pass batches that differ in their number of samples alone.",
        )
    return torch.cat(values)
