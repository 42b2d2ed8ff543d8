"""What finalize asks of a slim model besides the inputs that it is compared on: other inputs, and copies of it."""

from __future__ import annotations

import copy
import io
import pickle
import time
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from autogate.inputs import Inputs
from rewriters import Outputs
from rewriters.recording import tensor_slots
from rewriters.slimming import Answer, Probe, Probes, answers, finite, one_sample, probes, smaller_inputs

_MOST_SECONDS = 5.0
"""No further question is asked after this time."""


def ask(model: nn.Module, call: Inputs) -> list[Answer[Outputs]]:
    """What a model returns for a call, or a smaller one, and for inputs made from it (`rewriters.slimming.probes`).

    Empty if nothing that it returns for the call can be compared.
    """
    end = time.monotonic() + _MOST_SECONDS

    def run(_: Probe, inputs: Inputs) -> Outputs:
        outputs = Outputs.of(model, *inputs)
        if time.monotonic() > end or not finite(outputs):
            raise ValueError("nothing to compare")
        return outputs

    for inputs in smaller_inputs(*call, most_samples=2):
        found = answers(model, inputs, _questions(model, inputs), run)
        if found:
            return found
    return []


def _questions(model: nn.Module, inputs: Inputs) -> Probes:
    if (yield Probe("for a small input", lambda given: given)):
        yield from one_sample(inputs)
        yield from probes(model, inputs)


def _deep_copy(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model, {id(tensor): tensor for *_, tensor in tensor_slots(model)})


class _Pickler(pickle.Pickler):
    """Leaves tensors out."""

    def persistent_id(self, value: Any) -> int | None:
        return id(value) if isinstance(value, Tensor) else None


class _Unpickler(pickle.Unpickler):
    """Puts the same tensors in again."""

    def __init__(self, file: io.BytesIO, tensors: Mapping[int, Tensor]):
        super().__init__(file)
        self._tensors = tensors

    def persistent_load(self, key: int) -> Tensor:
        return self._tensors[key]


def _pickled(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    _Pickler(file).dump(model)
    file.seek(0)
    copied: nn.Module = _Unpickler(file, {id(tensor): tensor for *_, tensor in tensor_slots(model)}).load()
    return copied


Copy = Callable[[nn.Module], nn.Module]

_COPIES: Mapping[str, Copy] = {"a deep copy of the slim model": _deep_copy, "the slim model from a pickle": _pickled}


def copies_of(model: nn.Module) -> dict[str, Copy]:
    """The ways in which a model can be copied; copies share its tensors."""
    found = {}
    for what, made in _COPIES.items():
        try:
            made(model)
        except Exception:  # a class that was defined in a function, a handle that can't be copied
            continue
        found[what] = made
    return found
