"""The norm behind a convolution as a scale and a shift of each channel, where that is exact."""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import BatchNormAct2d
from torch import Tensor, nn

from autogate.saliency import Scaling

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, BatchNormAct2d)
"""Norms that scale and shift each channel by numbers that no input changes. Other classes may do more."""


class PassingNorm:
    """Stands before a batch norm's forward: what the convolution has normed already, passes.

    Args:
        norm: the norm.

    Attributes:
        done: whether the convolution has normed its latest output.
    """

    def __init__(self, norm: nn.Module):
        self.norm, self.done = norm, False
        self._known: tuple[list[tuple[int, int]], Tensor] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_known": None}

    def __call__(self, input: Tensor) -> Tensor:
        done, self.done = self.done, False
        if self.norm.training:
            self._known = None  # it writes into its statistics, which doesn't change their versions
        if not done:
            return type(self.norm).forward(self.norm, input)
        if isinstance(self.norm, BatchNormAct2d):
            return self.norm.act(self.norm.drop(input))
        return input

    @property
    def folds(self) -> bool:
        """Whether the norm is a scale and a shift now."""
        norm: Any = self.norm
        return not norm.training and norm.running_mean is not None

    def affine(self) -> Tensor:
        """The scale and the shift of each channel, shape (2, channels)."""
        norm = self.norm
        tensors = [one for one in (*norm._buffers.values(), *norm._parameters.values()) if one is not None]
        if any(one.is_inference() for one in tensors):  # these don't count their versions
            return self._computed()
        now = [(id(one), one._version) for one in tensors]
        if self._known is None or self._known[0] != now:
            self._known = now, self._computed()
        return self._known[1]

    @torch.no_grad()
    def _computed(self) -> Tensor:
        norm: Any = self.norm
        precise = torch.promote_types(norm.running_var.dtype, torch.float32)
        scale = torch.rsqrt(norm.running_var.to(precise) + norm.eps)
        if norm.weight is not None:
            scale = scale * norm.weight
        shift = -norm.running_mean * scale
        return torch.stack([scale, shift if norm.bias is None else shift + norm.bias])


def norm_of(model: nn.Module, scaling: Scaling) -> nn.Module | None:
    """The batch norm whose output is scaled, if its forward is the one of its class."""
    path = scaling.path if scaling.at == "output" else scaling.path.rpartition(".")[0]
    norm = model.get_submodule(path)
    return norm if type(norm) in BATCH_NORMS and "forward" not in norm.__dict__ else None
