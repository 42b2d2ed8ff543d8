"""What a slim model remembers of how it came to be: a small value that says how to slim the dense model again.

It stands on the model as a plain attribute: not in its state_dict, not among its modules; a deep copy or a
pickle of the model takes it along.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import JsonValue
from torch import Tensor, nn

from autogate.inputs import Inputs
from rewriters import AutogateError, ChannelMap, Side, SlimPlan
from rewriters.slimming import is_under, tensor_slots

ATTRIBUTE = "_autogate_history"
"""Name of the attribute of a slim model."""


@dataclass(frozen=True)
class TensorSpec:
    """Shape and dtype of a parameter or buffer."""

    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class KeptIndices:
    """Which indices stay along sides that lose the same ones.

    Attributes:
        sides: (name of the parameter or buffer, dimension).
        size: the length they had.
        kept: ascending.
    """

    sides: tuple[tuple[str, int], ...]
    size: int
    kept: tuple[int, ...]


@dataclass(frozen=True)
class Slimming:
    """One slimming that a model went through, as plain data.

    Attributes:
        tensors: parameters and buffers as they were before, those of convolutions on shortcuts left out.
        buffers: dtypes of the buffers that are not in the state_dict.
        inputs: shapes and dtypes of the example inputs, None where they hold what JSON can't (`write_inputs`).
        ignored: tensors whose channels all stay, as the caller asked.
        shortcuts, embed: what `prepare` was asked for.
        convolutions: paths of the 1x1 convolutions that it put on shortcuts.
        kept: indices that stay, for all sides that lose any.
        branches, selections: what was decided by the weights (`rewriters.Decisions`).
        rewritten: modules whose forward was changed, and why: "sizes", "branches", "shortcut"; "restored" where
            it is again what it was before convolutions were put on its shortcuts.
        removed: modules that are called no more and were taken out.
    """

    tensors: Mapping[str, TensorSpec]
    buffers: Mapping[str, str]
    inputs: JsonValue
    ignored: tuple[str, ...]
    shortcuts: str | tuple[str, ...]
    embed: bool
    convolutions: tuple[str, ...]
    kept: tuple[KeptIndices, ...]
    branches: Mapping[str, tuple[bool, ...]]
    selections: Mapping[str, tuple[int, ...]]
    rewritten: Mapping[str, str]
    removed: tuple[str, ...]


@dataclass(frozen=True)
class History:
    """All slimmings of a model, the first one first.

    Attributes:
        slimmings: what was done.
        dense_modules: the dense model's modules by path, each in a line of text (`describe_modules`).
        modules: the same of the slim model, when it was slimmed last.
        shapes: shapes of its parameters and buffers then.
    """

    slimmings: tuple[Slimming, ...]
    dense_modules: Mapping[str, str]
    modules: Mapping[str, str]
    shapes: Mapping[str, tuple[int, ...]]


def history_of(model: nn.Module) -> History | None:
    """What a slim model remembers, None if it was never slimmed."""
    found = model.__dict__.get(ATTRIBUTE)
    return found if isinstance(found, History) else None


def kept_indices(channel_map: ChannelMap, live: Tensor) -> tuple[KeptIndices, ...]:
    """Indices that stay along every side that loses any when the classes in `live` stay."""
    gathered: dict[tuple[int, tuple[int, ...]], list[tuple[str, int]]] = {}
    for side, classes in channel_map.classes.items():
        kept = tuple(channel_map.kept(side, live.cpu()).tolist())
        if len(kept) < len(classes):
            gathered.setdefault((len(classes), kept), []).append((side.tensor, side.dim))
    return tuple(KeptIndices(tuple(sides), size, kept) for (size, kept), sides in gathered.items())


def kept_by_side(kept: Collection[KeptIndices]) -> dict[Side, KeptIndices]:
    """The same, looked up by side."""
    return {Side(*side): one for one in kept for side in one.sides}


def rewritten(slim_plan: SlimPlan) -> dict[str, str]:
    """Modules whose forward a plan changes, and why."""
    with_selection = {path.rpartition(".")[0] for path in slim_plan.decisions.selections}
    why = dict.fromkeys(slim_plan.forwards, "sizes")
    why |= {path: "shortcut" for path in slim_plan.forwards if path in with_selection}
    why |= dict.fromkeys(slim_plan.decisions.branches, "branches")
    return why | dict.fromkeys(slim_plan.restored, "restored")


def describe_tensors(model: nn.Module, but: Collection[str] = ()) -> dict[str, TensorSpec]:
    """Parameters and persistent buffers, those of the modules in `but` left out."""
    return {
        name: TensorSpec(tuple(tensor.shape), dtype_name(tensor.dtype))
        for name, module, own_name, tensor in tensor_slots(model)
        if is_persistent(module, own_name) and not is_under(name, set(but))
    }


def describe_buffers(model: nn.Module) -> dict[str, str]:
    """Dtypes of the buffers that are not in the state_dict."""
    return {
        name: dtype_name(tensor.dtype)
        for name, module, own_name, tensor in tensor_slots(model)
        if not is_persistent(module, own_name)
    }


def describe_modules(model: nn.Module, but: Collection[str] = ()) -> dict[str, str]:
    """Each module's class and what it shows of itself, by path, those in `but` left out."""
    return {path: _describe(module) for path, module in model.named_modules() if not is_under(path, set(but))}


def _describe(module: nn.Module) -> str:
    shown = re.sub(r" at 0x[0-9a-fA-F]+", "", module.extra_repr())  # addresses differ from process to process
    return f"{type(module).__module__}.{type(module).__qualname__}({shown})"


def is_persistent(module: nn.Module, own_name: str) -> bool:
    """Whether a module's parameter or buffer goes into its state_dict."""
    return own_name not in module._non_persistent_buffers_set


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def dtype_of(name: str) -> torch.dtype:
    """The dtype of that name.

    Raises:
        AutogateError: there is none.
    """
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise AutogateError(f"torch has no dtype {name!r}.")
    return dtype


def write_inputs(inputs: Inputs) -> JsonValue:
    """Example inputs as JSON, tensors by shape and dtype; None where they hold anything else that JSON can't."""
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
    raise TypeError(f"a {type(value).__name__} can't be written down")


def read_inputs(written: JsonValue) -> Inputs:
    """Inputs of the kind that `write_inputs` wrote down; all tensors are zero.

    Raises:
        AutogateError: it is nothing that it writes.
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
    return AutogateError(f"{str(written)[:80]!r} describes no example inputs.")
