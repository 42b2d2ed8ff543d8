"""The format of a slim model's file: its tensors as safetensors, and a JSON `Header` in the safetensors metadata.

A slim model is its dense model, a record of slimmings, and tensors. The header says how timm builds the dense model
and lists every slimming that the model went through, with a checksum for each tensor. Classes of channels have no
names, only numbers that another version of autogate might assign differently; so the header holds the indices that stay
of every tensor. Nothing in a file is ever executed. pydantic parses the header strictly, into the dataclasses it was
written from.
"""

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

from autogate.files.data_config import DataConfig
from autogate.files.timm_builds import TimmBuild
from autogate.saliency import Choosing
from autogate.skipping import Skipping
from autogate.slim import Analysed, Slimming
from autogate.switching import Fusing
from rewriters import AutogateError

_HEADER, _CHECKSUM = "autogate", "autogate_checksum"
"""Keys of the file's metadata: the header as JSON, and a checksum of that JSON."""


@dataclass(frozen=True)
class Header:
    """Everything in a file besides its tensors.

    Attributes:
        format: version of this layout.
        versions: versions of autogate, torch and timm that wrote the file.
        model: class of the model, for people to read.
        build: how timm builds the dense model; None if the caller has to provide it.
        why_not: why `build` is None.
        slimmings: the slimmings to carry out, in order.
        tensors: a checksum for each tensor in the file.
        aliases: names in the state_dict whose tensor is stored under another name.
        buffers: dtypes of the buffers that are not in the state_dict.
        frozen: parameters that don't require gradients.
        training: modules in train mode.
        forwards: code of the rewritten forwards in eval and train mode, for people to read; it is never run.
        channels_last: tensors whose memory has channels last, in two or three dimensions of space.
        subnets: how the model holds several widths; None if it has one.
        adaptive: how it chooses its channels for each image; None if it doesn't.
        skipping: how it skips what is off for an image; None if it doesn't.
        data_config: how images become inputs, and the classes' names; None if the model doesn't say.
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
    channels_last: tuple[str, ...] = ()
    subnets: Fusing | None = None
    adaptive: Choosing | None = None
    skipping: Skipping | None = None
    data_config: DataConfig | None = None

    def records(self) -> tuple[Analysed, ...]:
        """What was done to the dense model, in order."""
        last = (self.adaptive, self.subnets)
        return (*self.slimmings, *(record for record in last if record is not None))


_JSON = TypeAdapter(Header)


CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
"""Memory format of tensors with so many dimensions; safetensors stores contiguous ones only."""


def metadata_of(header: Header) -> dict[str, str]:
    """The metadata of a file with this header. Keys and values are strings, as safetensors requires."""
    text = _JSON.dump_json(header).decode()
    return {"format": "pt", _HEADER: text, _CHECKSUM: _digest(text.encode())}


def read_file(path: Path) -> tuple[Header, dict[str, Tensor]]:
    """Read a file's header and tensors, and check both against their checksums.

    Raises:
        AutogateError: the file is truncated, altered, or not written by `autogate.save`.
        FileNotFoundError: there is no such file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        with safe_open(path, framework="pt") as opened:
            header = _header(opened.metadata() or {}, path)
            names = set(opened.keys())
            if names != set(header.tensors):
                odd = sorted(names ^ set(header.tensors))[0]
                raise _altered(path, f"tensor {odd} is only in its {'tensors' if odd in names else 'header'}")
            tensors = {name: opened.get_tensor(name) for name in header.tensors}
    except SafetensorError as error:
        raise AutogateError(
            f"it is truncated, or not a safetensors file: {error}.", where=str(path), remedy="Write or copy it again."
        ) from error
    for name, tensor in tensors.items():
        if checksum(tensor) != header.tensors[name]:
            raise _altered(path, f"tensor {name} is not the one that was saved")
    for alias, name in header.aliases.items():
        if name not in tensors or alias in tensors:
            raise _altered(path, f"its header says that {alias} shares the tensor {name}")
    return header, tensors


def _header(metadata: Mapping[str, str], path: Path) -> Header:
    text = metadata.get(_HEADER)
    if text is None:
        raise AutogateError(
            "it is a safetensors file, but autogate.save did not write it: its metadata has no autogate header.",
            where=str(path),
            remedy="Load its tensors with safetensors.torch.load_file.",
        )
    if _digest(text.encode()) != metadata.get(_CHECKSUM):
        raise _altered(path, "its header doesn't match its checksum")
    try:
        return _JSON.validate_json(text, strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        part = ".".join(map(str, first["loc"])) or "text"
        raise AutogateError(
            f"its header's {part} can't be read: {first['msg']}.",
            where=str(path),
            remedy="The file may be from another version of autogate.",
        ) from error


def _altered(path: Path, what: str) -> AutogateError:
    return AutogateError(f"it was altered or damaged: {what}.", where=str(path), remedy="Write or copy it again.")


def checksum(tensor: Tensor) -> str:
    """Checksum of a tensor's dtype, shape and values."""
    kind = f"{tensor.dtype} {tuple(tensor.shape)} ".encode()
    return _digest(kind, tensor.reshape(-1).view(torch.uint8).numpy())


def _digest(*parts: Any) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(part)
    return digest.hexdigest()
