"""Compare the outputs of two models, or of one model before and after a change, for the same inputs.

Deep networks whose weights magnify rounding may differ by more than float32's tolerance. The caller then compares
copies in float64.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from rewriters.recording import set_modes, tensors_of


def run_eval(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None = None) -> list[Tensor]:
    """The tensors that the model returns in eval mode, with full float32 precision; its modes are restored."""
    before = set_modes(model, False)
    try:
        with torch.no_grad(), full_precision():
            return tensors_of(model(*args, **(kwargs or {})))
    finally:
        set_modes(model, before)


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


@torch.no_grad()
def relative_error(got: list[Tensor], wanted: list[Tensor]) -> float:
    """The largest max |got - wanted| / max |wanted| over the outputs; infinite if shapes differ."""
    if [t.shape for t in got] != [t.shape for t in wanted]:
        return float("inf")
    errors = [0.0]
    for a, b in zip(got, wanted, strict=True):
        if b.numel():
            scale = b.double().abs().max().clamp_min(torch.finfo(torch.float32).tiny)
            errors.append(float((a.double() - b.double()).abs().max() / scale))
    return max(errors) if all(error == error for error in errors) else float("inf")
