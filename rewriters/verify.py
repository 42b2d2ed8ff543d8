"""Compare what two models, or one model before and after, give for the same inputs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from rewriters.recording import set_modes, tensors_of


def run_eval(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None = None) -> list[Tensor]:
    """Tensors that the model returns in eval mode, float32 not rounded; its modes are as before afterwards."""
    before = set_modes(model, False)
    try:
        with torch.no_grad(), full_precision():
            return tensors_of(model(*args, **(kwargs or {})))
    finally:
        set_modes(model, before)


@contextmanager
def full_precision() -> Iterator[None]:
    """Convolutions and matrix products take float32 as it is.

    On a GPU convolutions round their operands to ten bits (TF32) by default, and products where the caller has asked
    for it: two ways of computing the same differ by 1e-4 then.
    """
    with _kept_by_operator() as operators:
        try:
            convolutions, products = torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
        except RuntimeError:  # set operator by operator, so that these can't tell
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
    """What PyTorch lets set its precision by operator (none did up to 2.8), which is as before afterwards."""
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
    """Largest over the outputs of max |got - wanted| / max |wanted|; infinite where shapes differ."""
    if [t.shape for t in got] != [t.shape for t in wanted]:
        return float("inf")
    errors = [0.0]
    for a, b in zip(got, wanted, strict=True):
        if b.numel():
            scale = b.double().abs().max().clamp_min(torch.finfo(torch.float32).tiny)
            errors.append(float((a.double() - b.double()).abs().max() / scale))
    return max(errors) if all(error == error for error in errors) else float("inf")
