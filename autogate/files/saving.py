"""Write a slim model to a file (see `autogate.files.file_format`)."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from autogate.files.atomic_write import atomic_write
from autogate.files.data_config import data_config_of
from autogate.files.file_format import CHANNELS_LAST, Header, checksum, metadata_of
from autogate.files.timm_builds import Dense, dense_of, find_timm_build
from autogate.gating import BANK
from autogate.lock import locked
from autogate.saliency import record_of, saliency_of
from autogate.skipping import record_of_skipping
from autogate.slim import Form, History, describe_buffers, first_difference, form_of, history_of
from autogate.switching import SUBNETS, Fusing, subnets_of
from autogate.version import __version__
from autogate.wrappers import unwrap
from rewriters import AutogateError
from rewriters.forwards import RewrittenForward
from rewriters.recording import tensor_slots


@locked
def save(slim: nn.Module, path: str | os.PathLike[str], *, model_args: Mapping[str, Any] | None = None) -> None:
    """Write a slim, switchable or adaptive model to a safetensors file, from which `load` restores it to the last bit.

    The file says how timm's `create_model` builds the dense model, if it does (that is checked by building it), and
    which of its channels stay. The file is written under a temporary name and then moved into place: if writing fails,
    a file that was there before is intact.

    What the model says of images and classes goes along, in timm's keys of `slim.pretrained_cfg`: `input_size`,
    `interpolation`, `crop_pct`, `crop_mode`, `mean`, `std` and `label_names`.

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
        slim: the model that `finalize`, `subnets.fuse` or `adaptive.prepare` returned, trained further or not, or a
            compiled or distributed wrapper around it.
        path: path of the file, by convention "*.safetensors".
        model_args: arguments of `timm.create_model` that the dense model was built with and that can't be read off the
            model. Most can.

    Raises:
        AutogateError: the model was not slimmed, fused or made adaptive; it was changed since in a way that the file
            can't record; it holds a tensor that safetensors can't store; timm doesn't build the dense model with
            `model_args`; or the file can't be written.
    """
    slim = unwrap(slim)
    if BANK in slim._modules:
        raise AutogateError(
            "it has gates: it is prepared, and not slim yet.", where=type(slim).__name__, remedy="Finalize it first."
        )
    dense, subnets = dense_of(slim), subnets_of(slim)
    fusing = None if subnets is None else replace(subnets.record, active=subnets.active)
    with contextlib.nullcontext() if subnets is None else subnets.switched(slim, subnets.full):
        header, tensors = _contents(slim, dense, fusing, model_args)
    with atomic_write(Path(path)) as temporary:
        save_file(tensors, temporary, metadata=metadata_of(header))


def _contents(
    slim: nn.Module, dense: Dense, fusing: Fusing | None, model_args: Mapping[str, Any] | None
) -> tuple[Header, dict[str, Tensor]]:
    """What is written of a model; of a switchable one its largest subnet is active."""
    _check_unchanged(slim)
    history, bank = history_of(slim), saliency_of(slim)
    tensors, aliases = _tensors_of(slim)
    how, why_not = find_timm_build(slim, dense, model_args)
    header = Header(
        format=1,
        versions={"autogate": __version__, "torch": torch.__version__, "timm": timm.__version__},
        model=f"{type(slim).__module__}.{type(slim).__qualname__}",
        build=how,
        why_not=why_not,
        slimmings=() if history is None else history.slimmings,
        tensors={name: checksum(tensor) for name, tensor in tensors.items()},
        aliases=aliases,
        buffers=describe_buffers(slim),
        frozen=tuple(name for name, parameter in slim.named_parameters() if not parameter.requires_grad),
        training=tuple(path for path, module in slim.named_modules() if module.training),
        forwards=_forwards(slim),
        channels_last=_channels_last(slim, tensors),
        subnets=fusing,
        adaptive=None if bank is None else record_of(slim, bank),
        skipping=None if bank is None else record_of_skipping(slim, bank),
        data_config=data_config_of(slim),
    )
    return header, tensors


def _check_unchanged(slim: nn.Module) -> None:
    """Raise unless nothing but the records and the weights sets a model apart from the dense one."""
    where = type(slim).__name__
    before: Form | History | None = history_of(slim)
    since, added = "when the model was finalized.", tuple[str, ...]([SUBNETS])
    if (subnets := subnets_of(slim)) is not None:
        before, since = subnets.form, "when the model was fused."
    elif (bank := saliency_of(slim)) is not None:
        before, since, added = bank.form, "when it was given saliency modules.", bank.added
    assert before is not None  # `dense_of` has looked
    now = form_of(slim, added)
    for here, there in ((now.shapes, before.shapes), (now.modules, before.modules)):
        different = first_difference(here, there)
        if different is not None:
            name, is_now, was = different
            raise AutogateError(
                f"it is {is_now} now, and was {was} {since}",
                where=name or where,
                remedy="Make the change in the dense model, before prepare, or use torch.save.",
            )


def _tensors_of(slim: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors to write, each one once, and the further names that some of them have."""
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    first: dict[int, str] = {}
    state = slim.state_dict(keep_vars=True)
    own = {id(tensor) for *_, tensor in tensor_slots(slim)}
    for name, value in state.items():
        if id(value) not in own:
            raise AutogateError(
                "this entry of its state_dict is neither a parameter nor a buffer.",
                where=name,
                remedy="Use torch.save.",
            )
        if id(value) in first:
            aliases[name] = first[id(value)]
            continue
        first[id(value)] = name
        if value.layout != torch.strided or value.is_meta:
            raise AutogateError(f"safetensors can't store it: it is {value.layout} on {value.device}.", where=name)
        tensors[name] = value.detach().cpu().contiguous().clone()
    return tensors, aliases


def _channels_last(slim: nn.Module, names: Iterable[str]) -> tuple[str, ...]:
    state = {name: tensor for name, tensor in slim.state_dict().items() if not tensor.is_contiguous()}
    forms = {name: CHANNELS_LAST.get(state[name].ndim) for name in names if name in state}
    return tuple(
        name for name, form in forms.items() if form is not None and state[name].is_contiguous(memory_format=form)
    )


def _forwards(slim: nn.Module) -> dict[str, dict[str, str]]:
    found = {path: module.__dict__.get("forward") for path, module in slim.named_modules()}
    return {
        path: {"train" if training else "eval": forward.source(training) for training in forward.functions}
        for path, forward in found.items()
        if isinstance(forward, RewrittenForward)
    }
