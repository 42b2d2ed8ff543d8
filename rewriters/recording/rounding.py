"""A forward that rounds otherwise: what its outputs owe to rounding alone."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only


class OtherRounding(TorchDispatchMode):
    """Inside, each op's floating-point results are off by a random part of their precision, as if rounded otherwise.

    Parker, "Monte Carlo Arithmetic: exploiting randomness in floating-point arithmetic". Views, and what is written in
    place, stay as they are.
    """

    def __init__(self, seed: int):
        super().__init__()
        self._seed = seed

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if any(value.alias_info is not None for value in func._schema.returns):
            return out
        return tree_map_only(Tensor, self._rounded, out)

    def _rounded(self, value: Tensor) -> Tensor:
        if not value.is_floating_point() or value.device.type == "meta":
            return value
        self._seed += 1
        generator = torch.Generator(value.device).manual_seed(self._seed)
        part = torch.empty(value.shape, dtype=value.dtype, device=value.device).uniform_(-1, 1, generator=generator)
        return value + value * part * torch.finfo(value.dtype).eps
