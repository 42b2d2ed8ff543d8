"""Read a slim model from a file: build the dense model, replay its slimmings, and put the file's tensors in.

No code in a file is ever run: autogate writes every rewritten forward again, from the dense model's own code. The file
shows the code of the forwards it had, for people to read. A pickle of the slim model, or graphs in the file, would be
code from whoever wrote the file. All indices that stay, and the branches and modules removed, must come out as
recorded; a model whose channels are coupled in another way is refused.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from autogate.files.data_config import set_data_config
from autogate.files.file_format import CHANNELS_LAST, Header, read_file
from autogate.files.memory_limit import check_dense_model, check_inputs, default_limit
from autogate.files.timm_builds import build_with_timm
from autogate.gating import BANK
from autogate.inputs import Inputs, as_calls
from autogate.lock import locked
from autogate.saliency import Choosing, install_again, saliency_of
from autogate.skipping import skip_again
from autogate.slim import (
    ATTRIBUTE,
    Analysed,
    History,
    Slimming,
    cast,
    describe_modules,
    first_difference,
    history_of,
    read_inputs,
    replay,
)
from autogate.switching import Fusing, fuse_again, subnets_of
from rewriters import AutogateError, UndoLog
from rewriters.recording import tensor_slots
from rewriters.slimming import like, refresh_flat_weights


@locked
def load(
    path: str | os.PathLike[str],
    model: nn.Module | None = None,
    *,
    example_inputs: Any = None,
    device: torch.device | str | None = None,
    max_bytes: int | None = None,
) -> nn.Module:
    """Read the slim, switchable or adaptive model from a file that `save` wrote.

    The model is as it was when saved: the same outputs to the last bit, the same dtypes, frozen parameters, and train
    or eval mode. It can be trained, saved and slimmed again. No code in the file is run, no pickle is read, and nothing
    is downloaded. `timm.data.resolve_model_data_config` tells how images become its inputs, and
    `model.pretrained_cfg["label_names"]` has the names of its classes, if the saved model had them.

    Args:
        path: path of the file.
        model: the dense model, built like the one that was slimmed; its weights don't matter. It is changed in place
            and returned. If None, timm builds it.
        example_inputs: inputs that the model can be run on, as for `prepare`. Needed only if the file says so.
        device: device of the loaded model. If None, the device of `model`, or the CPU if there is none.
        max_bytes: how many bytes the dense model that timm builds may take, and so may the example inputs. A file that
            asks for more is refused before memory is taken. If None, a hundred times the file's size, and at least
            1 GiB.

    Raises:
        AutogateError: the file is truncated, altered, or not one that `save` wrote; it needs `model`, `example_inputs`
            or more memory than `max_bytes`; `model` is not the model that was slimmed; or its code or autogate's has
            changed too much since. The message says which part is wrong. A model that you passed is left as it was.
        FileNotFoundError: there is no such file.
    """
    header, tensors = read_file(Path(path))
    limit = default_limit(Path(path).stat().st_size) if max_bytes is None else max_bytes
    if model is None:
        model = _built(header, path, limit)
    elif _is_changed(model):
        raise AutogateError(
            "it is already prepared or slim.", where=type(model).__name__, remedy="Pass the dense model."
        )
    undo_log = UndoLog()
    try:
        if example_inputs is None:
            check_inputs(header, limit, model)
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        _slim_again(model, header, example_inputs, shapes, undo_log)
        _fill(model, header, tensors, device, undo_log)
        if header.data_config is not None:
            set_data_config(model, header.data_config, undo_log)
        if (subnets := subnets_of(model)) is not None:
            subnets.subnet.put()
    except BaseException as error:
        if (subnets := subnets_of(model)) is not None:
            subnets.detach(model)
        if (bank := saliency_of(model)) is not None:
            bank.detach()
        undo_log.undo()
        if isinstance(error, Exception):
            raise _not_carried_out(error, header, type(model).__name__, path) from error
        raise
    return model


@locked
def dense_model(path: str | os.PathLike[str], max_bytes: int | None = None) -> nn.Module:
    """Build the dense model that a file's slim model was made from, with random weights.

    Args:
        path: path of the file.
        max_bytes: how many bytes the model may take, as for `load`.

    Raises:
        AutogateError: the file can't be read (see `load`), or doesn't say how to build the model.
    """
    header, _ = read_file(Path(path))
    return _built(header, path, default_limit(Path(path).stat().st_size) if max_bytes is None else max_bytes)


def _built(header: Header, path: str | os.PathLike[str], limit: int) -> nn.Module:
    if header.build is None:
        raise AutogateError(
            f"it doesn't say how to build the dense {header.model}: {header.why_not}.",
            where=str(path),
            remedy="Pass the dense model: autogate.load(path, model=...).",
        )
    try:
        check_dense_model(header, limit)
    except AutogateError as error:
        raise _not_carried_out(error, header, header.model, path) from error
    return build_with_timm(header.build)


def _not_carried_out(error: Exception, header: Header, model: str, path: str | os.PathLike[str]) -> AutogateError:
    written = ", ".join(f"{name} {version}" for name, version in header.versions.items())
    place = f"(file {path}, written with {written})"
    if isinstance(error, AutogateError):
        return AutogateError(f"{error.cause} {place}", where=error.where, remedy=error.remedy)
    return AutogateError(f"it can't be slimmed as the file says: {error} {place}", where=model)


def _is_changed(model: nn.Module) -> bool:
    """Whether autogate has prepared or slimmed it."""
    found = history_of(model), subnets_of(model), saliency_of(model)
    return BANK in model._modules or any(one is not None for one in found)


def _slim_again(
    model: nn.Module, header: Header, example_inputs: Any, shapes: Mapping[str, tuple[int, ...]], undo_log: UndoLog
) -> None:
    dense = describe_modules(model)
    at = next((tensor.device for *_, tensor in tensor_slots(model)), torch.device("cpu"))
    for record in header.records():
        calls = tree_map_only(Tensor, lambda tensor: tensor.to(at), _calls(record, example_inputs, model))
        if isinstance(record, Fusing):
            fuse_again(model, record, calls, undo_log)
        elif isinstance(record, Choosing):
            bank = install_again(model, record, calls, shapes, undo_log)
            if header.skipping is not None:
                skip_again(model, bank, header.skipping, undo_log)
        else:
            assert isinstance(record, Slimming)
            replay(model, record, calls, undo_log)
    made = history_of(model)
    if made is not None:
        undo_log.set_attribute(model, ATTRIBUTE, History(header.slimmings, dense, made.modules, made.shapes))
    elif not header.records():
        raise AutogateError("the file's header lists no slimming.")


def _calls(record: Analysed, example_inputs: Any, model: nn.Module) -> tuple[Inputs, ...]:
    if example_inputs is not None:
        return as_calls(example_inputs, model)
    written = (record.inputs, *record.others)
    if None in written:
        raise AutogateError(
            "its example inputs are of a type that the file can't store.",
            where=type(model).__name__,
            remedy="Pass them: autogate.load(path, example_inputs=...).",
        )
    return tuple(map(read_inputs, written))


def _fill(
    model: nn.Module,
    header: Header,
    tensors: Mapping[str, Tensor],
    device: torch.device | str | None,
    undo_log: UndoLog,
) -> None:
    """Put a file's tensors, dtypes, frozen parameters and modes into a model that was slimmed as the file says."""
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    shapes |= {alias: shapes[name] for alias, name in header.aliases.items()}
    state = model.state_dict(keep_vars=True)
    different = first_difference({name: tuple(tensor.shape) for name, tensor in state.items()}, shapes)
    if different is not None:
        name, here, there = different
        raise AutogateError(
            f"its shape is {here} in the model slimmed as the file says, and {there} in the file.", where=name
        )
    for alias, name in header.aliases.items():
        if state[alias] is not state[name]:
            raise AutogateError(f"it shares its tensor with {name} in the file, but not in this model.", where=alias)
    odd = next((name for name in header.buffers if name in state), None)
    if odd is not None:
        raise AutogateError("the file's header lists it among the buffers that are not in the state_dict.", where=odd)
    tensors = {**tensors, **_with_channels_last(header, tensors)}
    cast(model, header.buffers, undo_log)
    names = {id(tensor): name for name, tensor in reversed(state.items())}
    filled: dict[int, Tensor] = {}
    for _, module, own_name, tensor in list(tensor_slots(model)):
        if id(tensor) not in filled:
            new = tensors[names[id(tensor)]].clone() if id(tensor) in names else tensor.detach()
            filled[id(tensor)] = like(tensor, new.to(tensor.device if device is None else device))
        undo_log.set_tensor(module, own_name, filled[id(tensor)])
    refresh_flat_weights(model, undo_log)
    frozen, training = set(header.frozen), set(header.training)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in frozen)
    for path, module in model.named_modules():
        undo_log.set_attribute(module, "training", path in training)


def _with_channels_last(header: Header, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors that had channels last when they were saved, with channels last."""
    odd = next(
        (name for name in header.channels_last if name not in tensors or tensors[name].ndim not in CHANNELS_LAST), None
    )
    if odd is not None:
        raise AutogateError("the file's header lists it among the tensors with channels last.", where=odd)
    return {
        name: tensors[name].contiguous(memory_format=CHANNELS_LAST[tensors[name].ndim]) for name in header.channels_last
    }
