"""The record that a slim model has of its slimmings: a small value that says how to slim the dense model again.

It is a plain attribute of the model, outside of its state_dict and its modules. A deep copy or a pickle of the model
has it too. Slimming a model again adds another `Slimming` to its `History`; loading replays them in order.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from pydantic import JsonValue, TypeAdapter, ValidationError
from torch import Tensor, nn

from autogate.inputs import Inputs
from autogate.slim.layers import Layer
from rewriters import AutogateError, ChannelMap, Side, SlimPlan
from rewriters.recording import tensor_slots
from rewriters.slimming import is_under

ATTRIBUTE = "_autogate_history"
"""Name of the attribute of a slim model that holds its history."""


@dataclass(frozen=True)
class TensorSpec:
    """Shape and dtype of a parameter or buffer."""

    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class KeptIndices:
    """The indices that stay along sides that lose the same ones.

    Attributes:
        sides: (name of the parameter or buffer, dimension).
        size: length of these sides before.
        kept: the indices that stay, ascending.
    """

    sides: tuple[tuple[str, int], ...]
    size: int
    kept: tuple[int, ...]


@dataclass(frozen=True)
class Analysed:
    """A model before its channels were removed, and how it was analysed, as plain data.

    Attributes:
        tensors: parameters and buffers, without those of convolutions on shortcuts.
        buffers: dtypes of the buffers that are not in the state_dict.
        inputs: shapes and dtypes of the example inputs; None if they hold what JSON can't (`write_inputs`).
        ignored: tensors whose channels all stay because the caller asked for it.
        shortcuts, embed: arguments of `prepare`.
        convolutions: paths of the 1x1 convolutions that prepare put on shortcuts.
        others: the other example inputs, as `inputs`.
        refused: modules whose channels stay because a check of values found that they'd compute something else, and
            whether all that is in them stays.
        looping: modules that loop over their inputs and keep their own code where they can.
    """

    tensors: Mapping[str, TensorSpec]
    buffers: Mapping[str, str]
    inputs: JsonValue
    ignored: tuple[str, ...]
    shortcuts: str | tuple[str, ...]
    embed: bool
    convolutions: tuple[str, ...]
    others: tuple[JsonValue, ...] = field(default=(), kw_only=True)
    refused: tuple[tuple[str, bool], ...] = field(default=(), kw_only=True)
    looping: tuple[str, ...] = field(default=(), kw_only=True)


@dataclass(frozen=True)
class Slimming(Analysed):
    """One slimming of a model, as plain data.

    Attributes:
        kept: indices that stay, for all sides that lose any.
        branches, selections: what was decided by the weights (`rewriters.Decisions`).
        rewritten: modules whose forward changed, and why: "sizes", "branches", "shortcut", "dead columns"; "restored"
            if it is again what it was before convolutions were put on its shortcuts.
        removed: modules that are no longer called and were removed.
        layers: convolutions and linear layers, with their channels and multiply-adds before and after.
        params: number of parameters before, without those of convolutions on shortcuts.
        method: what decided which channels died, as the call that makes it; empty if no gate has learned.
        dead: the indices that stay though they are dead, because a layer needs a channel (all sides that have some).
    """

    kept: tuple[KeptIndices, ...]
    branches: Mapping[str, tuple[bool, ...]]
    selections: Mapping[str, tuple[int, ...]]
    rewritten: Mapping[str, str]
    removed: tuple[str, ...]
    layers: tuple[Layer, ...] = ()
    params: int = 0
    method: str = ""
    dead: tuple[KeptIndices, ...] = ()


@dataclass(frozen=True)
class History:
    """All slimmings of a model, the first one first.

    Attributes:
        slimmings: records of the slimmings.
        dense_modules: the dense model's modules by path, each as a line of text (`describe_modules`).
        modules: the same for the slim model, after its last slimming.
        shapes: shapes of its parameters and buffers, after its last slimming.
    """

    slimmings: tuple[Slimming, ...]
    dense_modules: Mapping[str, str]
    modules: Mapping[str, str]
    shapes: Mapping[str, tuple[int, ...]]

    @property
    def removed(self) -> tuple[str, ...]:
        """Modules that were removed."""
        return tuple(path for slimming in self.slimmings for path in slimming.removed)

    @property
    def rewritten(self) -> dict[str, str]:
        """Modules whose forward isn't the dense model's, and why, as in `Slimming`."""
        found = {path: why for slimming in self.slimmings for path, why in slimming.rewritten.items()}
        return {path: why for path, why in found.items() if why != "restored"}


def slimming_to_json(slimming: Slimming) -> str:
    """A record as text, for a checkpoint."""
    return TypeAdapter(Slimming).dump_json(slimming).decode()


def slimming_from_json(text: str) -> Slimming:
    """The record that `slimming_to_json` wrote.

    Raises:
        AutogateError: the text is no such record.
    """
    try:
        return TypeAdapter(Slimming).validate_json(text)
    except ValidationError as error:
        raise AutogateError(f"the record of the slimming can't be read: {error.errors()[0]['msg']}.") from error


def history_of(model: nn.Module) -> History | None:
    """The history of a slim model; None if the model was never slimmed."""
    found = model.__dict__.get(ATTRIBUTE)
    return found if isinstance(found, History) else None


def kept_indices(channel_map: ChannelMap, live: Tensor) -> tuple[KeptIndices, ...]:
    """For every side that loses indices when only the classes in `live` stay: the indices that stay."""
    every = {side: channel_map.kept(side, live.cpu()) for side in channel_map.classes}
    kept = {side: own for side, own in every.items() if len(own) < len(channel_map.classes[side])}
    return _gathered(channel_map, kept)


def dead_indices(channel_map: ChannelMap, dead: Tensor) -> tuple[KeptIndices, ...]:
    """For every side with some of the classes in `dead` (bool, shape (classes,)): their indices."""
    is_dead = torch.cat([dead.cpu(), dead.new_zeros(1)])
    if not is_dead.any():
        return ()
    found = {side: torch.nonzero(is_dead[classes.cpu()]).flatten() for side, classes in channel_map.classes.items()}
    return _gathered(channel_map, {side: own for side, own in found.items() if len(own)})


def _gathered(channel_map: ChannelMap, indices: Mapping[Side, Tensor]) -> tuple[KeptIndices, ...]:
    gathered: dict[tuple[int, tuple[int, ...]], list[tuple[str, int]]] = {}
    for side, own in indices.items():
        key = (len(channel_map.classes[side]), tuple(own.tolist()))
        gathered.setdefault(key, []).append((side.tensor, side.dim))
    return tuple(KeptIndices(tuple(sides), size, kept) for (size, kept), sides in gathered.items())


def kept_by_side(kept: Collection[KeptIndices]) -> dict[Side, KeptIndices]:
    """The same, by side."""
    return {Side(*side): one for one in kept for side in one.sides}


def rewritten(slim_plan: SlimPlan) -> dict[str, str]:
    """The modules whose forward a plan changes, and why."""
    with_selection = {path.rpartition(".")[0] for path in slim_plan.decisions.selections}
    why = dict.fromkeys(slim_plan.forwards, "sizes")
    why |= {path: "shortcut" for path in slim_plan.forwards if path in with_selection}
    why |= dict.fromkeys(slim_plan.masked, "dead columns")
    why |= dict.fromkeys(slim_plan.decisions.branches, "branches")
    return why | dict.fromkeys(slim_plan.restored, "restored")


def describe_tensors(model: nn.Module, excluded: Collection[str] = ()) -> dict[str, TensorSpec]:
    """Shapes and dtypes of parameters and persistent buffers, without those of the modules in `excluded`."""
    return {
        name: TensorSpec(tuple(tensor.shape), dtype_name(tensor.dtype))
        for name, module, own_name, tensor in tensor_slots(model)
        if is_persistent(module, own_name) and not is_under(name, set(excluded))
    }


def describe_buffers(model: nn.Module) -> dict[str, str]:
    """Dtypes of the buffers that are not in the state_dict."""
    return {
        name: dtype_name(tensor.dtype)
        for name, module, own_name, tensor in tensor_slots(model)
        if not is_persistent(module, own_name)
    }


def describe_modules(model: nn.Module, excluded: Collection[str] = ()) -> dict[str, str]:
    """Each module's class and `extra_repr`, by path, without those of the modules in `excluded`."""
    return {path: _describe(module) for path, module in model.named_modules() if not is_under(path, set(excluded))}


def _describe(module: nn.Module) -> str:
    shown = re.sub(r" at 0x[0-9a-fA-F]+", "", module.extra_repr())  # addresses differ between processes
    return f"{type(module).__module__}.{type(module).__qualname__}({shown})"


@dataclass(frozen=True)
class Form:
    """A model's shapes and modules as text: what nobody may change between the call that records them and `save`."""

    shapes: Mapping[str, tuple[int, ...]]
    modules: Mapping[str, str]


def form_of(model: nn.Module, excluded: Collection[str] = ()) -> Form:
    """The form of a model without the modules in `excluded`; of a switchable one that of its active subnet."""
    shapes = {name: spec.shape for name, spec in describe_tensors(model, excluded).items()}
    return Form(shapes, describe_modules(model, excluded))


def is_persistent(module: nn.Module, own_name: str) -> bool:
    """Whether a module's parameter or buffer is in its state_dict."""
    return own_name not in module._non_persistent_buffers_set


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def dtype_of(name: str) -> torch.dtype:
    """The dtype with this name.

    Raises:
        AutogateError: torch has no such dtype.
    """
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise AutogateError(f"torch has no dtype {name!r}.")
    return dtype


def write_inputs(inputs: Inputs) -> JsonValue:
    """Example inputs as JSON, tensors as shape and dtype; None if they hold anything else that JSON can't."""
    try:
        return [_write(value) for value in inputs]
    except TypeError:
        return None


def _write(value: Any) -> JsonValue:
    if isinstance(value, Tensor):
        return {"tensor": list(value.shape), "dtype": dtype_name(value.dtype)}
    if value is None or type(value) in (bool, int, float, str):
        return value
    if type(value) is tuple:
        return {"tuple": [_write(item) for item in value]}
    if type(value) is list:
        return [_write(item) for item in value]
    if type(value) is dict and all(type(key) is str for key in value):
        return {"dict": {key: _write(item) for key, item in value.items()}}
    raise TypeError(f"an object of type {type(value).__name__} can't be described in JSON")


def read_inputs(written: JsonValue) -> Inputs:
    """Make inputs like those that `write_inputs` described; all tensors are zero.

    Raises:
        AutogateError: it is not a description that `write_inputs` writes.
    """
    inputs = _read(written)
    if not (isinstance(inputs, list) and len(inputs) == 2 and isinstance(inputs[0], tuple)):
        raise _unreadable(written)
    args, kwargs = inputs
    if not isinstance(kwargs, dict):
        raise _unreadable(kwargs)
    return args, kwargs


def _read(written: Any) -> Any:
    if isinstance(written, list):
        return [_read(item) for item in written]
    if not isinstance(written, dict):
        return written
    match written:
        case {"tensor": list(shape), "dtype": str(dtype), **rest} if not rest and all(type(n) is int for n in shape):
            return torch.zeros(shape, dtype=dtype_of(dtype))
        case {"tuple": list(items), **rest} if not rest:
            return tuple(_read(item) for item in items)
        case {"dict": dict(items), **rest} if not rest:
            return {key: _read(item) for key, item in items.items()}
    raise _unreadable(written)


def _unreadable(written: Any) -> AutogateError:
    return AutogateError(f"{str(written)[:80]!r} is not a description of example inputs.")
