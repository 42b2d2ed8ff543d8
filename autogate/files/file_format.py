"""The format of a slim model's file: tensors as safetensors, and in its metadata a `Header` as JSON."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from autogate.files.timm_builds import TimmBuild
from autogate.slim import Slimming
from rewriters import AutogateError

_HEADER, _CHECKSUM = "autogate", "autogate_checksum"
"""Entries of the file's metadata: the header as JSON, and a checksum of that text."""


@dataclass(frozen=True)
class Header:
    """All that a file says beside its tensors.

    Attributes:
        format: version of this layout.
        versions: of autogate, torch and timm, when it was written.
        model: class of the model, for those who read.
        build: how timm builds the dense model; None where the caller has to give it.
        why_not: why that is so.
        slimmings: to be carried out one after the other.
        tensors: a checksum for each tensor in the file.
        aliases: names of the state_dict whose tensor stands in the file under another name.
        buffers: dtypes of the buffers that are not in the state_dict.
        frozen: parameters that take no gradient.
        training: modules in train mode.
        forwards: code of the rewritten forwards in eval and train mode, for those who read; it is never run.
    """

    format: Literal[1]
    versions: Mapping[str, str]
    model: str
    build: TimmBuild | None
    why_not: str
    slimmings: tuple[Slimming, ...]
    tensors: Mapping[str, str]
    aliases: Mapping[str, str]
    buffers: Mapping[str, str]
    frozen: tuple[str, ...]
    training: tuple[str, ...]
    forwards: Mapping[str, Mapping[str, str]]


_JSON = TypeAdapter(Header)


def metadata_of(header: Header) -> dict[str, str]:
    """The file's metadata: all its keys and values are text."""
    text = _JSON.dump_json(header).decode()
    return {"format": "pt", _HEADER: text, _CHECKSUM: _digest(text.encode())}


def read_file(path: Path) -> tuple[Header, dict[str, Tensor]]:
    """A file's header and tensors, both found to be what was written."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        with safe_open(path, framework="pt") as opened:
            header = _header(opened.metadata() or {}, path)
            names = set(opened.keys())
            if names != set(header.tensors):
                odd = sorted(names ^ set(header.tensors))[0]
                raise _altered(path, f"tensor {odd} is in its {'tensors' if odd in names else 'header'} alone")
            tensors = {name: opened.get_tensor(name) for name in header.tensors}
    except SafetensorError as error:
        raise AutogateError(
            f"it is truncated, or no safetensors file: {error}.", where=str(path), remedy="Write or copy it again."
        ) from error
    for name, tensor in tensors.items():
        if checksum(tensor) != header.tensors[name]:
            raise _altered(path, f"tensor {name} is not what was saved")
    for alias, name in header.aliases.items():
        if name not in tensors or alias in tensors:
            raise _altered(path, f"its header gives {alias} the tensor {name}")
    return header, tensors


def _header(metadata: Mapping[str, str], path: Path) -> Header:
    text = metadata.get(_HEADER)
    if text is None:
        raise AutogateError(
            "it is a safetensors file, but none that autogate.save wrote: its header has no plan.",
            where=str(path),
            remedy="Load its tensors with safetensors.torch.load_file.",
        )
    if _digest(text.encode()) != metadata.get(_CHECKSUM):
        raise _altered(path, "its header doesn't fit its checksum")
    try:
        return _JSON.validate_json(text, strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        part = ".".join(map(str, first["loc"])) or "text"
        raise AutogateError(
            f"its header's {part} can't be read: {first['msg']}.",
            where=str(path),
            remedy="It may be from another version of autogate.",
        ) from error


def _altered(path: Path, what: str) -> AutogateError:
    return AutogateError(f"it was altered or damaged: {what}.", where=str(path), remedy="Write or copy it again.")


def checksum(tensor: Tensor) -> str:
    kind = f"{tensor.dtype} {tuple(tensor.shape)} ".encode()
    return _digest(kind, tensor.reshape(-1).view(torch.uint8).numpy())


def _digest(*parts: Any) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(part)
    return digest.hexdigest()
