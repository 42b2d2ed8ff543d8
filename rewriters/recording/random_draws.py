"""Draws of random numbers in a forward: which calls draw, and draws that don't depend on what else is drawn.

A generator gives other numbers once a draw before has another shape. So two runs of which one is slimmed can be
compared only with draws that give every element the same number (`OneNumber`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from rewriters.recording.pytrees import tensors_of

_UNTAGGED = frozenset({"random_", "random"})
"""Ops that draw and that PyTorch doesn't tag."""

_WHETHER = ("train", "training", "dropout", "dropout_p")
"""Arguments of which a zero or False says that an op draws nothing."""


def is_draw(op: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether a call of an ATen op draws random numbers."""
    if torch.Tag.nondeterministic_seeded not in getattr(op, "tags", ()) and _name(op) not in _UNTAGGED:
        return False
    given = _arguments(op, args, kwargs)
    return all(given.get(name, True) for name in _WHETHER)


def _name(op: Any) -> str:
    return str(getattr(op, "overloadpacket", op)).rpartition(".")[-1]


def _arguments(op: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """A call's arguments by the names in the op's schema, defaults included."""
    schema = op._schema.arguments
    defaults = {one.name: one.default_value for one in schema if one.has_default_value()}
    return {**defaults, **{one.name: value for one, value in zip(schema, args, strict=False)}, **kwargs}


def _depends_on_tensors(op: Any, given: Mapping[str, Any]) -> bool:
    """Whether the values of a tensor say what a call draws."""
    return _name(op) == "bernoulli" or any(
        isinstance(given.get(name), Tensor) for name in ("mean", "std", "p", "low", "high")
    )


class OneNumber(TorchDispatchMode):
    """Inside, a draw gives all its elements the same number, and a draw of the same kind gives the same again.

    A draw that depends on a tensor of its own (`multinomial`, `bernoulli(p)`) and a permutation begin with the same
    state of their generator instead: they are the same for the same shape.

    Attributes:
        drawn: the shapes that were drawn.
    """

    def __init__(self, seed: int):
        super().__init__()
        self._seed = seed
        self.drawn: list[list[tuple[int, ...]]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if not is_draw(func, args, kwargs):
            return func(*args, **kwargs)
        given = _arguments(func, args, kwargs)
        self._reseed(given)
        out = func(*args, **kwargs)
        self.drawn.append([tuple(tensor.shape) for tensor in tensors_of(out)])
        number = _NUMBERS.get(_name(func).rstrip("_"))
        if number is not None and not _depends_on_tensors(func, given):
            one = torch.empty((), dtype=out.dtype, device=out.device)
            out.copy_(number(one, given, torch.Generator(out.device).manual_seed(self._seed)))
        return out

    def _reseed(self, given: Mapping[str, Any]) -> None:
        device = next((tensor.device for tensor in tensors_of(list(given.values()))), given.get("device"))
        generators = [given.get("generator"), torch.default_generator]
        if device is not None and torch.device(device).type == "cuda":
            index = torch.device(device).index
            generators.append(torch.cuda.default_generators[torch.cuda.current_device() if index is None else index])
        for generator in generators:
            if generator is not None:
                generator.manual_seed(self._seed)


def _between(one: Tensor, given: Mapping[str, Any], generator: torch.Generator) -> Tensor:
    low, high = (given.get("low", given.get("from")), given.get("high", given.get("to")))
    return one.random_(generator=generator) if high is None else one.random_(low or 0, high, generator=generator)


def _by(method: str, *names: str) -> Callable[[Tensor, Mapping[str, Any], torch.Generator], Tensor]:
    """Draws one number with a method of tensors and those of a call's arguments that it takes."""

    def number(one: Tensor, given: Mapping[str, Any], generator: torch.Generator) -> Tensor:
        taken = [given[name] for name in names if name in given]
        return getattr(one, method)(*taken, generator=generator)

    return number


_NUMBERS: dict[str, Callable[[Tensor, Mapping[str, Any], torch.Generator], Tensor]] = {
    **dict.fromkeys(["rand", "rand_like"], _by("uniform_")),
    **dict.fromkeys(["randn", "randn_like"], _by("normal_")),
    **dict.fromkeys(["randint", "randint_like", "random"], _between),
    **dict.fromkeys(["normal", "normal_functional"], _by("normal_", "mean", "std")),
    "uniform": _by("uniform_", "from", "to"),
    "exponential": _by("exponential_", "lambd"),
    "cauchy": _by("cauchy_", "median", "sigma"),
    "log_normal": _by("log_normal_", "mean", "std"),
    "geometric": _by("geometric_", "p"),
    "bernoulli": _by("bernoulli_", "p"),
}
"""Draws all of whose elements are alike, by name: how one element is drawn."""
