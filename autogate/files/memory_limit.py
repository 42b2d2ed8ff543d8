"""Look at what a file asks for before any memory is taken for it.

A small file can name a huge dense model, or huge example inputs. The dense model is first built on the meta device,
where tensors have shapes and no data. Its shapes are compared with the file's record, and its size with a limit.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from torch import nn

from autogate.files.file_format import Header
from autogate.files.timm_builds import outline_with_timm
from autogate.slim import check_tensors, dtype_of
from rewriters import AutogateError
from rewriters.recording import tensor_slots

SMALLEST_LIMIT = 2**30
"""Bytes that the dense model, or the example inputs, may always take."""

TIMES_THE_FILE = 100
"""How many times the file's size they may take: as if a tenth of the channels were left on both sides of a kernel."""


def default_limit(file_size: int) -> int:
    """The limit in bytes for a file of this size."""
    return max(SMALLEST_LIMIT, TIMES_THE_FILE * file_size)


def check_dense_model(header: Header, limit: int) -> None:
    """Raise unless the dense model that a header names is the one that was slimmed, and is within the limit."""
    outline = None if header.build is None else outline_with_timm(header.build)
    if outline is None:
        return
    for record in header.records()[:1]:
        check_tensors(outline, record.tensors)
    tensors = {id(tensor): tensor for *_, tensor in tensor_slots(outline)}
    _check("the dense model", sum(tensor.nbytes for tensor in tensors.values()), limit, type(outline).__name__)


def check_inputs(header: Header, limit: int, model: nn.Module) -> None:
    """Raise unless the example inputs that a header describes are within the limit."""
    for record in header.records():
        _check("the example inputs", sum(_bytes_in([record.inputs, *record.others])), limit, type(model).__name__)


def _bytes_in(written: Any) -> Iterator[int]:
    """Bytes of each tensor in a description of inputs. What can't be read is told by `read_inputs`."""
    match written:
        case {"tensor": list(shape), "dtype": str(dtype)} if all(type(size) is int for size in shape):
            yield max(0, math.prod(shape)) * dtype_of(dtype).itemsize
        case dict() | list():
            for item in written.values() if isinstance(written, dict) else written:
                yield from _bytes_in(item)


def _check(what: str, size: int, limit: int, where: str) -> None:
    if size > limit:
        raise AutogateError(
            f"{what} would take {_human(size)}, more than the limit of {_human(limit)}, for a file of this size.",
            where=where,
            remedy=f"If you trust the file, allow it: autogate.load(path, max_bytes={size}).",
        )


def _human(size: int) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 / 100 else f"{size:,} bytes"
