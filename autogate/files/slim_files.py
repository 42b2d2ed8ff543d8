"""Slim models in files: safetensors for the tensors, JSON in its header for how to come to the slim model.

A file tells how to build the dense model and which slimmings it went through. Loading builds that model,
carries the same slimmings out on it, and puts the tensors in. Nothing in a file is ever run: forwards are
rewritten anew from the dense model's own code.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import timm
import torch
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from autogate.files.building import Build, build, how_to_build
from autogate.gating import BANK
from autogate.inputs import Inputs, as_call
from autogate.lock import locked
from autogate.slim import (
    ATTRIBUTE,
    History,
    Slimming,
    cast,
    describe_buffers,
    describe_modules,
    describe_tensors,
    first_difference,
    history_of,
    read_inputs,
    replay,
)
from autogate.version import __version__
from autogate.wrappers import unwrap
from rewriters import AutogateError, UndoLog
from rewriters.forwards import RewrittenForward
from rewriters.slimming import like, refresh_flat_weights, tensor_slots

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
    build: Build | None
    why_not: str
    slimmings: tuple[Slimming, ...]
    tensors: Mapping[str, str]
    aliases: Mapping[str, str]
    buffers: Mapping[str, str]
    frozen: tuple[str, ...]
    training: tuple[str, ...]
    forwards: Mapping[str, Mapping[str, str]]


_JSON = TypeAdapter(Header)


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
    how, why_not = how_to_build(slim, history, model_args)
    header = Header(
        format=1,
        versions={"autogate": __version__, "torch": torch.__version__, "timm": timm.__version__},
        model=f"{type(slim).__module__}.{type(slim).__qualname__}",
        build=how,
        why_not=why_not,
        slimmings=history.slimmings,
        tensors={name: _checksum(tensor) for name, tensor in tensors.items()},
        aliases=aliases,
        buffers=describe_buffers(slim),
        frozen=tuple(name for name, parameter in slim.named_parameters() if not parameter.requires_grad),
        training=tuple(path for path, module in slim.named_modules() if module.training),
        forwards=_forwards(slim),
    )
    text = _JSON.dump_json(header).decode()
    metadata = {"format": "pt", _HEADER: text, _CHECKSUM: _digest(text.encode())}
    with in_place_of(Path(path)) as temporary:
        save_file(tensors, temporary, metadata=metadata)


@locked
def load(
    path: str | os.PathLike[str],
    model: nn.Module | None = None,
    *,
    example_inputs: Any = None,
    device: torch.device | str | None = None,
) -> nn.Module:
    """The slim model from a file that `save` wrote.

    It is as it was saved: its outputs to the last bit, dtypes, frozen parameters, train or eval mode, and it
    can be trained, saved and slimmed again. No code comes from the file, no pickle is read, and nothing is
    downloaded.

    Args:
        path: of the file.
        model: the dense model, built like the one that was slimmed; its weights don't matter. It is changed in
            place and returned. Without it, timm builds the model.
        example_inputs: what the model is run on to find its channels, as `prepare` takes them; needed where the
            file says so.
        device: where the model shall be; where the given one is, or the CPU, if None.

    Raises:
        AutogateError: the file is truncated, altered, or none of these; it needs `model` or `example_inputs`;
            `model` is not the one that was slimmed; its code or autogate's is too different by now. The message
            says which part is wrong. A model that was given is as it was.
        FileNotFoundError: there is no such file.
    """
    header, tensors = _read(Path(path))
    if model is None:
        model = _built(header, path)
    elif history_of(model) is not None or BANK in model._modules:
        raise AutogateError(
            "it is prepared or slim already.", where=type(model).__name__, remedy="Give the dense model."
        )
    undo_log = UndoLog()
    try:
        _slim_again(model, header, example_inputs, undo_log)
        _fill(model, header, tensors, device, undo_log)
    except BaseException as error:
        undo_log.undo()
        if isinstance(error, Exception):
            raise _not_carried_out(error, header, model, path) from error
        raise
    return model


def dense_model(path: str | os.PathLike[str]) -> nn.Module:
    """The dense model that the slim model in a file comes from, as timm builds it, its weights random.

    Raises:
        AutogateError: as `load` does, where the file can't be read or doesn't say how to build it.
    """
    header, _ = _read(Path(path))
    return _built(header, path)


def _built(header: Header, path: str | os.PathLike[str]) -> nn.Module:
    if header.build is None:
        raise AutogateError(
            f"it doesn't say how to build the dense {header.model}, for {header.why_not}.",
            where=str(path),
            remedy="Give it: autogate.load(path, model=...).",
        )
    return build(header.build)


def _not_carried_out(error: Exception, header: Header, model: nn.Module, path: str | os.PathLike[str]) -> AutogateError:
    written = ", ".join(f"{name} {version}" for name, version in header.versions.items())
    place = f"(plan of {path}, written with {written})"
    if isinstance(error, AutogateError):
        return AutogateError(f"{error.cause} {place}", where=error.where, remedy=error.remedy)
    return AutogateError(f"it can't be slimmed as the file says: {error} {place}", where=type(model).__name__)


def _slim_again(model: nn.Module, header: Header, example_inputs: Any, undo_log: UndoLog) -> None:
    dense = describe_modules(model)
    at = next((tensor.device for *_, tensor in tensor_slots(model)), torch.device("cpu"))
    for slimming in header.slimmings:
        inputs = tree_map_only(Tensor, lambda tensor: tensor.to(at), _inputs(slimming, example_inputs, model))
        replay(model, slimming, inputs, undo_log)
    made = history_of(model)
    if made is None:
        raise AutogateError("the file's plan holds no slimming.")
    undo_log.set_attribute(model, ATTRIBUTE, History(header.slimmings, dense, made.modules, made.shapes))


def _inputs(slimming: Slimming, example_inputs: Any, model: nn.Module) -> Inputs:
    if example_inputs is not None:
        return as_call(example_inputs, model)
    if slimming.inputs is None:
        raise AutogateError(
            "its example inputs are of a kind that the file can't hold.",
            where=type(model).__name__,
            remedy="Give them: autogate.load(path, example_inputs=...).",
        )
    return read_inputs(slimming.inputs)


def _fill(
    model: nn.Module,
    header: Header,
    tensors: Mapping[str, Tensor],
    device: torch.device | str | None,
    undo_log: UndoLog,
) -> None:
    """Put a file's tensors into a model that has been slimmed for them."""
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    shapes |= {alias: shapes[name] for alias, name in header.aliases.items()}
    state = model.state_dict(keep_vars=True)
    different = first_difference({name: tuple(tensor.shape) for name, tensor in state.items()}, shapes)
    if different is not None:
        name, here, there = different
        raise AutogateError(f"slimmed as the file says it has shape {here}, and its tensor has {there}.", where=name)
    for alias, name in header.aliases.items():
        if state[alias] is not state[name]:
            raise AutogateError(f"it is shared with {name} in the file, and not in this model.", where=alias)
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


def _checksum(tensor: Tensor) -> str:
    kind = f"{tensor.dtype} {tuple(tensor.shape)} ".encode()
    return _digest(kind, tensor.reshape(-1).view(torch.uint8).numpy())


def _digest(*parts: Any) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def _read(path: Path) -> tuple[Header, dict[str, Tensor]]:
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
        if _checksum(tensor) != header.tensors[name]:
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


@contextlib.contextmanager
def in_place_of(path: Path) -> Iterator[Path]:
    """A file to write to that takes the place of `path` when all of it is on the disk, and not before."""
    path = Path(os.path.realpath(path))
    temporary = path.with_name(f".{secrets.token_hex(4)}.{path.name}")
    try:
        temporary.touch(exist_ok=False)
        mode = (path if path.exists() else temporary).stat().st_mode
        yield temporary
        temporary.chmod(stat.S_IMODE(mode))  # safetensors makes files for nobody else to read
        with open(temporary, "r+b") as written:
            os.fsync(written.fileno())
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        raise AutogateError(
            f"it could not be written ({error}); what was there before, if anything, is whole.", where=str(path)
        ) from error
    finally:
        temporary.unlink(missing_ok=True)
