"""Write a slim model to a file."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from autogate.files.atomic_write import atomic_write
from autogate.files.file_format import Header, checksum, metadata_of
from autogate.files.timm_builds import find_timm_build
from autogate.gating import BANK
from autogate.slim import (
    History,
    describe_buffers,
    describe_modules,
    describe_tensors,
    first_difference,
    history_of,
)
from autogate.version import __version__
from autogate.wrappers import unwrap
from rewriters import AutogateError
from rewriters.forwards import RewrittenForward
from rewriters.slimming import tensor_slots


def save(slim: nn.Module, path: str | os.PathLike[str], *, model_args: Mapping[str, Any] | None = None) -> None:
    """Write a slim model to a safetensors file that `load` makes it from again, to the last bit.

    The file says how to build the dense model, where timm's `create_model` gives it (that is tried), and which
    channels of it stay. It is written beside its place and then put there: if writing fails, what was there
    before is whole.

        >>> import os, tempfile, timm, torch, autogate
        >>> model = autogate.prepare(timm.create_model("resnet18", num_classes=10))
        >>> with torch.no_grad():
        ...     autogate.gates(model).alpha[::2] = 0
        >>> slim = autogate.finalize(model, warn=False).eval()
        >>> path = os.path.join(tempfile.mkdtemp(), "slim.safetensors")
        >>> autogate.save(slim, path)
        >>> x = torch.randn(1, 3, 64, 64)
        >>> torch.equal(autogate.load(path)(x), slim(x))
        True

    Args:
        slim: as `finalize` returned it, trained on or not; a compiled or distributed wrapper is looked through.
        path: of the file, by custom "*.safetensors".
        model_args: arguments of `timm.create_model` that the dense model was built with and that can't be read
            off it; most can.

    Raises:
        AutogateError: it was not slimmed, or was changed since in a way that can't be written down, or holds a
            tensor that safetensors can't, or timm doesn't build the dense model with `model_args`, or the file
            can't be written.
    """
    slim = unwrap(slim)
    history = _unchanged_history(slim)
    tensors, aliases = _tensors_of(slim)
    how, why_not = find_timm_build(slim, history, model_args)
    header = Header(
        format=1,
        versions={"autogate": __version__, "torch": torch.__version__, "timm": timm.__version__},
        model=f"{type(slim).__module__}.{type(slim).__qualname__}",
        build=how,
        why_not=why_not,
        slimmings=history.slimmings,
        tensors={name: checksum(tensor) for name, tensor in tensors.items()},
        aliases=aliases,
        buffers=describe_buffers(slim),
        frozen=tuple(name for name, parameter in slim.named_parameters() if not parameter.requires_grad),
        training=tuple(path for path, module in slim.named_modules() if module.training),
        forwards=_forwards(slim),
    )
    with atomic_write(Path(path)) as temporary:
        save_file(tensors, temporary, metadata=metadata_of(header))


def _unchanged_history(slim: nn.Module) -> History:
    """A model's history, which is all that sets it apart from the dense one, its weights aside."""
    where = type(slim).__name__
    history = history_of(slim) if isinstance(slim, nn.Module) else None
    if history is None:
        raise AutogateError(
            "it was not slimmed: it carries no record of that.",
            where=where,
            remedy="Save what autogate.finalize returned, or use torch.save for other models.",
        )
    if BANK in slim._modules:
        raise AutogateError("it is prepared, and not slim yet.", where=where, remedy="Finalize it first.")
    shapes = {name: spec.shape for name, spec in describe_tensors(slim).items()}
    for here, there in ((shapes, history.shapes), (describe_modules(slim), history.modules)):
        different = first_difference(here, there)
        if different is not None:
            name, is_now, was = different
            raise AutogateError(
                f"it is {is_now} and was {was} when the model was finalized.",
                where=name or where,
                remedy="Change the dense model instead, before prepare; or use torch.save.",
            )
    return history


def _tensors_of(slim: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """What goes into the file, each tensor once, and the other names that some have."""
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    first: dict[int, str] = {}
    state = slim.state_dict(keep_vars=True)
    own = {id(tensor) for *_, tensor in tensor_slots(slim)}
    for name, value in state.items():
        if id(value) not in own:
            raise AutogateError(
                "its state_dict has an entry that is no parameter or buffer.", where=name, remedy="Use torch.save."
            )
        if id(value) in first:
            aliases[name] = first[id(value)]
            continue
        first[id(value)] = name
        if value.layout != torch.strided or value.is_meta:
            raise AutogateError(f"safetensors can't hold it: it is {value.layout} on {value.device}.", where=name)
        tensors[name] = value.detach().cpu().contiguous().clone()
    return tensors, aliases


def _forwards(slim: nn.Module) -> dict[str, dict[str, str]]:
    found = {path: module.__dict__.get("forward") for path, module in slim.named_modules()}
    return {
        path: {"train" if training else "eval": source for training, source in forward.sources.items()}
        for path, forward in found.items()
        if isinstance(forward, RewrittenForward)
    }
