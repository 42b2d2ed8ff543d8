"""Inputs that the example inputs didn't show, made from them: other batches and lengths, options left out, states.

The dense model is the judge: what it refuses asks nothing of the slim one.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Generator, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rewriters.analysis import samples_in
from rewriters.recording import attributes_preserved, generators_kept, leaves_of, modules_of, set_modes, tensors_of
from rewriters.slimming.trial_inputs import Inputs, changed, smaller_inputs

_SAMPLES, _OTHER_SAMPLES, _MORE_SAMPLES = 3, 4, 5
_STEPS = (1, 32)
"""How much longer: by one, or by a stride's worth where the model doesn't take that."""

_MOST_LENGTHS = 4

_STATES = ("state", "hidden", "cache", "past", "mem", "hx", "prev")
"""Parts of the names of arguments that take what an earlier call returned."""

Change = Callable[[Inputs], Inputs]


@dataclass(frozen=True)
class Probe:
    """A question that the example inputs leave open.

    Attributes:
        what: how its inputs differ from the example's, in words.
        change: makes them from the example's, small or whole.
        of_length: whether they differ in a number of entries, and not in what is given.
        beyond: the question that this one goes beyond: a forward that takes a third way here depends on a number that
            has many values, and isn't traced for all of them.
    """

    what: str
    change: Change
    of_length: bool = False
    beyond: str = ""


SMALLER = Probe("for a smaller input", lambda inputs: next(smaller_inputs(*inputs, most_samples=None)), of_length=True)
"""That of the first run: values are compared on few samples and small images."""

Probes = Generator[Probe, bool, None]
"""Yields questions. It is sent whether the model took the inputs of the last one."""


def probes(model: nn.Module, inputs: Inputs, traced: Collection[str] = ()) -> Probes:
    """What to ask of a model besides the example inputs.

    Args:
        model: the dense model, or one that is called alike. It runs if it has an argument for what it returned earlier.
        inputs: example inputs, by position and by name.
        traced: the questions for whose inputs the model was traced too (`Probe.what`): more is asked of their kind.
    """
    yield from _of_lengths(inputs, traced)
    try:
        signature = inspect.signature(model.forward)
        given = dict(signature.bind(*inputs[0], **inputs[1]).arguments)
    except (TypeError, ValueError):  # some callables have none
        return
    optional = [name for name, parameter in signature.parameters.items() if parameter.default is None]
    names = [name for name in optional if given.get(name) is not None]
    for left_out in [[name] for name in names] + ([names] if names[1:] else []):
        yield Probe(f"without {' and '.join(left_out)}", _with(signature, dict.fromkeys(left_out)))
    for name, value in given.items():
        if type(value) in (list, tuple) and value and all(isinstance(entry, Tensor) for entry in value):
            yield from _of_entries(signature, name, traced)
    states = [name for name in optional if given.get(name) is None and any(part in name for part in _STATES)]
    if len(states) == 1:
        yield Probe(f"with {states[0]} as an earlier call returned it", _given_back(model, signature, states[0]))


def one_sample(inputs: Inputs) -> Iterator[Probe]:
    """A batch of one, if the inputs are a larger one."""
    if samples_in(*inputs) > 1:
        yield _of_samples(1)


def _of_lengths(inputs: Inputs, traced: Collection[str]) -> Probes:
    """Three samples, with each length of the inputs in turn longer by one.

    If the model doesn't take that along all dimensions of one length (frames and colours may both be three), each is
    asked alone.
    """
    samples = _SAMPLES if samples_in(*inputs) != _SAMPLES else _OTHER_SAMPLES
    grown = False
    for place, length in enumerate(_lengths(inputs)):
        dims = _dims(inputs, length)
        taken = yield from _of_length(samples, place, length, None, traced)
        for dim in () if taken or not dims[1:] else dims:
            taken |= yield from _of_length(samples, place, length, dim, traced)
        grown |= taken
    if not grown and (yield (probe := _of_samples(samples))) and probe.what in traced:
        yield _of_samples(_MORE_SAMPLES, probe.what)


def _of_length(
    samples: int, place: int, length: int, dim: int | None, traced: Collection[str]
) -> Generator[Probe, bool, bool]:
    """One of the lengths longer, along one dimension or along all that have it. Returns whether the model took it."""
    for step in _STEPS:
        probe = _longer(samples, place, length + step, step, dim)
        if (yield probe):
            if probe.what in traced:
                yield _longer(_MORE_SAMPLES, place, length + 3 * step, 3 * step, dim, probe.what)
            return True
    return False


def _longer(samples: int, place: int, length: int, step: int, dim: int | None, beyond: str = "") -> Probe:
    """More samples, and `step` more of what is the `place`-th of the lengths; it is `length` then in small inputs.

    That is along all dimensions of that length, or along `dim` alone.
    """

    def change(inputs: Inputs) -> Inputs:
        lengths = _lengths(inputs)
        return _with_samples(_with_length(inputs, lengths[min(place, len(lengths) - 1)], step, dim), samples)

    where = "" if dim is None else f" along dimension {dim}"
    return Probe(f"for {samples} samples and a length of {length}{where}", change, of_length=True, beyond=beyond)


def _of_samples(samples: int, beyond: str = "") -> Probe:
    what = f"for {samples} samples" if samples > 1 else "for one sample"
    return Probe(what, lambda inputs: _with_samples(inputs, samples), of_length=True, beyond=beyond)


def _of_entries(signature: inspect.Signature, name: str, traced: Collection[str]) -> Probes:
    """One more entry in an argument that is a list of tensors."""
    probe = Probe(f"with one more entry in {name}", _with_entries(signature, name, 1), of_length=True)
    if (yield probe) and probe.what in traced:
        more = _with_entries(signature, name, 3)
        yield Probe(f"with three more entries in {name}", more, of_length=True, beyond=probe.what)


def _with_entries(signature: inspect.Signature, name: str, more: int) -> Change:
    def change(inputs: Inputs) -> Inputs:
        entries = signature.bind(*inputs[0], **inputs[1]).arguments[name]
        return _with(signature, {name: type(entries)([*entries, *[entries[-1]] * more])})(inputs)

    return change


def _given_back(model: nn.Module, signature: inspect.Signature, name: str) -> Change:
    """What the model returned for inputs, besides its first output, as an argument of the next call."""

    def change(inputs: Inputs) -> Inputs:
        modes = set_modes(model, False)
        try:
            with torch.no_grad(), attributes_preserved(modules_of(model)), generators_kept(model, *inputs):
                returned = model(*inputs[0], **inputs[1])
        finally:
            set_modes(model, modes)
        if isinstance(returned, Mapping) or hasattr(returned, "_asdict"):
            state = (returned if isinstance(returned, Mapping) else returned._asdict())[name]
        else:
            _, *rest = returned
            state = tuple(rest) if rest[1:] else rest[0]
        if not all(isinstance(leaf, Tensor) for leaf in leaves_of(state)):
            raise TypeError("a state that isn't made of tensors alone may change when it is used")
        return _with(signature, {name: state})(inputs)

    return change


def _with(signature: inspect.Signature, values: Mapping[str, Any]) -> Change:
    """Inputs with other values for these arguments. What is None is left out, or given as None in the middle."""

    def change(inputs: Inputs) -> Inputs:
        args, kwargs = list(inputs[0]), dict(inputs[1])
        places = {name: place for place, name in enumerate(signature.parameters) if place < len(args)}
        for name, value in values.items():
            if name in places:
                args[places[name]] = value
            elif value is None:
                kwargs.pop(name, None)
            else:
                kwargs[name] = value
        return tuple(args), kwargs

    return change


def _lengths(inputs: Inputs) -> list[int]:
    """The distinct lengths of dimensions besides that of the samples, largest first."""
    samples = samples_in(*inputs)
    sizes = {size for tensor in tensors_of(inputs) for dim, size in enumerate(tensor.shape) if dim or size != samples}
    return sorted(sizes - {0, 1}, reverse=True)[:_MOST_LENGTHS]


def _dims(inputs: Inputs, length: int) -> list[int]:
    """The dimensions of this length besides that of the samples."""
    samples = samples_in(*inputs)
    places = ((dim, size) for tensor in tensors_of(inputs) for dim, size in enumerate(tensor.shape))
    return sorted({dim for dim, size in places if size == length and (dim or size != samples)})


def _with_length(inputs: Inputs, length: int, step: int, only: int | None) -> Inputs:
    """The inputs with `step` more entries along every dimension of this length, or one; the first ones come again."""
    samples = samples_in(*inputs)

    def change(tensor: Tensor) -> Tensor:
        for dim, size in enumerate(tensor.shape):
            if size == length and (dim or size != samples) and only in (None, dim):
                tensor = tensor.index_select(dim, torch.arange(size + step, device=tensor.device) % size)
        return tensor

    return changed(inputs, change)


def _with_samples(inputs: Inputs, count: int) -> Inputs:
    """The inputs with `count` samples; those of floating-point numbers are all different."""
    samples = samples_in(*inputs)

    def change(tensor: Tensor) -> Tensor:
        if not tensor.ndim or tensor.shape[0] != samples:
            return tensor
        places = torch.arange(count, device=tensor.device)
        repeated = tensor.index_select(0, places % samples)
        if not tensor.is_floating_point():
            return repeated
        factor = 1 - 0.25 * (places // samples).to(tensor.dtype)
        return repeated * factor.view(-1, *[1] * (tensor.ndim - 1))

    return changed(inputs, change)
