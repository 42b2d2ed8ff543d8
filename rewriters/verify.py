"""Compare what two models, or one model before and after, give for the same inputs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from rewriters.preserving import set_modes


def run_eval(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None = None) -> list[Tensor]:
    """Tensors that the model returns in eval mode; its modes are as before afterwards."""
    before = set_modes(model, False)
    try:
        with torch.no_grad():
            return [leaf for leaf in tree_leaves(model(*args, **(kwargs or {}))) if isinstance(leaf, Tensor)]
    finally:
        set_modes(model, before)


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
