"""Compare the outputs of two models, or of one model before and after a change, for the same inputs.

Deep networks whose weights magnify rounding may differ by more than float32's tolerance. The caller then compares
copies in float64.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rewriters.recording import OneNumber, OtherRounding, generators_kept, held_tensors, set_modes, set_train_mode

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""Largest relative difference that is accepted between the outputs of the gated and the slim model, by dtype."""

EXACT_IN_FLOAT64 = 1e-10
"""Largest relative difference in float64 if only rounding makes the float32 outputs differ."""

PLAINLY = 1e-3
"""Relative difference that isn't rounding where a model doesn't run in float64."""


def run_eval(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None = None) -> list[Tensor]:
    """The tensors that the model returns in eval mode, with full float32 precision.

    Its modes and the generators of random numbers are restored: two runs draw the same numbers.
    """
    return _run(model, args, kwargs or {})[0]


def run_train(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None = None) -> list[Tensor]:
    """The tensors that the model returns in train mode (`set_train_mode`), with full float32 precision.

    Every draw of random numbers gives one number, so that it is the same for a slim model. Modes, buffers and the
    generators of random numbers are restored.
    """
    before = set_train_mode(model)
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        with torch.no_grad(), full_precision(), generators_kept(model, args, kwargs), OneNumber(_SEEDS[0]):
            return held_tensors(model(*args, **(kwargs or {})))
    finally:
        set_modes(model, before)
        for buffer, values in buffers:
            if not torch.equal(buffer, values):
                buffer.copy_(values)


def _run(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[list[Tensor], bool]:
    """What `run_eval` returns, and whether random numbers were drawn."""
    before = set_modes(model, False)
    try:
        with torch.no_grad(), full_precision(), generators_kept(model, args, kwargs) as drawn:
            return held_tensors(model(*args, **kwargs)), drawn()
    finally:
        set_modes(model, before)


_SEEDS = (0, 1, 2)
"""For draws of one number: half of the channels that are dropped with a probability of a half are there in some run."""


@dataclass(frozen=True)
class Outputs:
    """What a model returns before a change, to compare it with what it returns afterwards.

    A model that draws random numbers draws the same in both runs. If the change makes a draw another shape (noise for
    each channel), the numbers differ all the same, and so do all that are drawn after them. Then the outputs are
    compared with draws that give one number for all elements (`OneNumber`).

    Attributes:
        values: the tensors that the model returns.
        alike: if it draws random numbers, the tensors for draws of one number each, and the shapes that were drawn.
        training: whether it ran in train mode.
    """

    values: list[Tensor]
    alike: tuple[tuple[list[Tensor], list[Any]], ...] = ()
    training: bool = False

    @classmethod
    def of(
        cls, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None = None, training: bool = False
    ) -> Outputs:
        """Run a model in eval or train mode. It and the generators of random numbers are afterwards as before."""
        if training:
            return cls(run_train(model, args, kwargs), training=True)
        values, drawn = _run(model, args, kwargs or {})
        return cls(values, _with_numbers(model, args, kwargs or {}) if drawn else ())

    def error(self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None, allowed: float,
              rounding: Sequence[float] = ()) -> float:  # fmt: skip
        """The relative error of what the changed model returns.

        Args:
            model: the changed model.
            args: positional arguments that it ran on before.
            kwargs: keyword arguments that it ran on before.
            allowed: the largest error that passes; only if it is exceeded, draws of one number are compared.
            rounding: `rounding_errors` of the model before the change.
        """
        run = run_train if self.training else run_eval
        error = relative_error(run(model, args, kwargs), self.values, rounding)
        if error <= allowed or not self.alike:
            return error
        now = _with_numbers(model, args, kwargs or {})
        if all(shapes == before for (_, shapes), (_, before) in zip(now, self.alike, strict=True)):
            return error  # the same was drawn, so that's not why
        return max(relative_error(got, wanted, rounding) for (got, _), (wanted, _) in zip(now, self.alike, strict=True))


def _with_numbers(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[tuple[list[Tensor], list[Any]], ...]:
    """For each seed the tensors that a model returns if each draw is one number, and the shapes that it draws."""
    found = []
    for seed in _SEEDS:
        with generators_kept(model, args, kwargs), OneNumber(seed) as numbers:
            found.append((run_eval(model, args, kwargs), numbers.drawn))
    return tuple(found)


@contextmanager
def full_precision() -> Iterator[None]:
    """Inside, convolutions and matrix products compute in full float32.

    On a GPU, convolutions round their operands to ten bits (TF32) by default, and matrix products do if the caller
    asked for it. Two ways to compute the same result then differ by 1e-4.
    """
    with _kept_by_operator() as operators:
        try:
            convolutions, products = torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
        except RuntimeError:  # the caller has set precisions by operator, so these two have no single value
            for operator in operators:
                operator.fp32_precision = "ieee"
            yield
            return
        try:
            torch.backends.cudnn.allow_tf32 = False
            torch.set_float32_matmul_precision("highest")
            yield
        finally:
            torch.backends.cudnn.allow_tf32 = convolutions
            torch.set_float32_matmul_precision(products)


@contextmanager
def _kept_by_operator() -> Iterator[list[Any]]:
    """The operators whose precision can be set (none up to PyTorch 2.8); their precision is restored afterwards."""
    homes = ((torch.backends.cudnn, "conv"), (torch.backends.cudnn, "rnn"), (torch.backends.cuda, "matmul"))
    operators: list[Any] = [
        operator for home, name in homes if hasattr(operator := getattr(home, name, None), "fp32_precision")
    ]
    before = [operator.fp32_precision for operator in operators]
    try:
        yield operators
    finally:
        for operator, precision in zip(operators, before, strict=True):
            operator.fp32_precision = precision


_RUNS, _MARGIN = 4, 32
"""Runs that round otherwise, and how much larger than their differences an output may be that is rounding alone."""


def rounding_errors(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None = None) -> list[float]:
    """For each output of a model the largest value that rounding alone may give it (`OtherRounding`).

    The mean of what an instance norm has centred is 0 but for rounding. An output that isn't larger than this in
    either of two models has nothing to compare.
    """
    plain, errors = run_eval(model, args, kwargs), []
    for seed in range(_RUNS):
        with OtherRounding(seed * 1_000_003):
            other = run_eval(model, args, kwargs)
        errors.append([_largest(one.double() - two.double()) for one, two in zip(other, plain, strict=True)])
    return [_MARGIN * max(each) for each in zip(*errors, strict=True)]


def _largest(value: Tensor) -> float:
    return float(value.abs().max()) if value.numel() else 0.0


@torch.no_grad()
def relative_error(got: list[Tensor], wanted: list[Tensor], rounding: Sequence[float] = ()) -> float:
    """The largest max |got - wanted| / max |wanted| over the outputs; infinite if shapes differ.

    Args:
        got: the outputs.
        wanted: the outputs that they are compared with.
        rounding: `rounding_errors` of the model that gave `wanted`; outputs that are no larger aren't compared.
    """
    if [t.shape for t in got] != [t.shape for t in wanted]:
        return float("inf")
    errors = [0.0]
    for index, (a, b) in enumerate(zip(got, wanted, strict=True)):
        if rounding and max(_largest(a), _largest(b)) <= rounding[index]:
            continue
        if b.numel():
            scale = b.double().abs().max().clamp_min(torch.finfo(torch.float32).tiny)
            errors.append(float((a.double() - b.double()).abs().max() / scale))
    return max(errors) if all(error == error for error in errors) else float("inf")
