"""Files of tensors and plain values: torch's format, with a checksum of all that they hold, read without pickled code.

torch's format has a checksum for each tensor, but torch doesn't look at it: a file in which a bit has flipped is read
without a word. So a file holds its content and a CRC-32 of it, which is quick and finds damage; it is no protection
against someone who alters the file on purpose.
"""

from __future__ import annotations

import shutil
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from autogate.files import atomic_write
from rewriters import AutogateError

_ENTRIES = {"content", "checksum"}


def write_tensors(value: Any, path: Path) -> None:
    """Write tensors and plain values, completely or not at all.

    Raises:
        AutogateError: the file could not be written.
    """
    with atomic_write(path) as temporary:
        put_tensors(value, temporary)


def put_tensors(value: Any, temporary: Path) -> None:
    """Write tensors and plain values to a file that is not in its place yet.

    Raises:
        OSError: the file could not be written.
    """
    try:
        torch.save({"content": value, "checksum": checksum(value)}, temporary)
    except RuntimeError as error:  # torch's text for a full disk is "unexpected pos ..."
        free = shutil.disk_usage(temporary.parent).free
        raise OSError(
            f"torch couldn't write all of it, and {free / 2**20:.0f} MiB are free on the disk: "
            f"{str(error).splitlines()[0]}"
        ) from error


def read_tensors(path: Path) -> Any:
    """Read a file that `write_tensors` wrote. Other pickles are refused.

    Raises:
        AutogateError: the file is damaged, or not such a file.
        FileNotFoundError: there is no such file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged bytes make torch's reader raise errors of all kinds
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise AutogateError(f"it is damaged, or not a checkpoint: {reason}", where=str(path)) from error
    if not isinstance(found, dict) or set(found) != _ENTRIES:
        raise AutogateError("it is not a checkpoint that this version of autogate train wrote.", where=str(path))
    if checksum(found["content"]) != found["checksum"]:
        raise AutogateError(
            "it is damaged: what it holds doesn't match its checksum.", where=str(path), remedy="Copy it again."
        )
    return found["content"]


def checksum(value: Any) -> int:
    """CRC-32 of tensors and plain values: dtypes, shapes, strides and bytes of tensors, types and values of the rest.

    >>> from autogate.training.tensor_files import checksum
    >>> checksum({"a": 1}) == checksum({"a": 1}), checksum({"a": 1}) == checksum({"a": 1.0})
    (True, False)
    """
    found = 0
    for part in _parts(value):
        found = zlib.crc32(part, found)
    return found


def _parts(value: Any) -> Iterator[Any]:
    """What makes up a value, as bytes. Each part says where it ends, so that no two values have the same parts."""
    kind = type(value).__name__
    if isinstance(value, Tensor):
        yield f"{value.dtype} {tuple(value.shape)} {value.layout}".encode()
        if value.layout == torch.strided:
            yield f"{value.stride()};".encode()
        flat = value.detach().cpu().to_dense() if value.layout != torch.strided else value.detach().cpu()
        yield flat.contiguous().reshape(-1).view(torch.uint8).numpy()
    elif isinstance(value, Mapping):
        yield f"{kind} {len(value)};".encode()
        for key, item in value.items():
            yield from _parts(key)
            yield from _parts(item)
        if hasattr(value, "__dict__"):  # the versions of modules that a state_dict has as its `_metadata`
            yield from _parts(dict(vars(value)))
    elif isinstance(value, (tuple, list)):
        yield f"{kind} {len(value)};".encode()
        for item in value:
            yield from _parts(item)
    else:
        text = repr(value)
        yield f"{kind} {len(text)} {text};".encode()
