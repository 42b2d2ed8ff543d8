"""An experiment: what closed channels fed into a kernel is given back in closed form to the channels that stay.

What a kernel of the dense model reads is predicted, by ridge regression over calibration images, from the live channels
that the same kernel reads in the closed model. The prediction is multiplied into the kernel's live columns; its
constant part is added behind the layer. The closed model runs once over all images. Each kernel is replaced right
before its call, so the kernels behind it see what it returns then.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import autogate
from autogate.criteria.observing import Observer
from rewriters import Side

RIDGE = 1e-4
"""Relative to the mean variance of the live channels."""


def regression(reads: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Coefficients and constants that predict the columns of `wanted` from those of `reads`, by ridge regression.

    Args:
        reads: shape (rows, live channels).
        wanted: shape (rows, channels).

    Returns:
        Shapes (live channels, channels) and (channels,).
    """
    mean, target = reads.mean(0), wanted.mean(0)
    centred = (reads - mean).double()
    gram = centred.T @ centred
    gram.diagonal().add_(RIDGE * gram.diagonal().mean())
    taken = torch.linalg.solve(gram, centred.T @ (wanted - target).double()).float()
    return taken, target - mean @ taken


@torch.no_grad()
def compensated(closed: nn.Module, dense: nn.Module, images: Tensor, stride: int = 2) -> nn.Module:
    """The closed model, compensated. Its layers get hooks that add constants, so this is for measuring alone.

    Args:
        closed: a prepared model with closed gates; it is changed.
        dense: the same model with all gates open.
        images: calibration images.
        stride: every so many rows of what a kernel reads are used.
    """
    bank, reads = autogate.gates(closed), dict[Side, Tensor]()
    channel_map = bank.channel_map
    live = torch.cat([bank.live, bank.live.new_ones(1)])
    behind = {side: Constant(closed, side) for side in channel_map.gated}

    def note(side: Side, index: Tensor, rows: Tensor) -> None:
        reads.setdefault(side, rows[::stride].clone())

    def replace(side: Side, index: Tensor, rows: Tensor) -> None:
        if side not in reads or side not in channel_map.classes:
            return
        keep = live[channel_map.classes[side]]
        taken, constant = regression(rows[::stride][:, keep], reads.pop(side))
        kernel = dense.get_parameter(side.tensor).movedim(side.dim, -1)
        columns = torch.zeros_like(kernel)
        columns[..., keep] = kernel @ taken.T
        closed.get_parameter(side.tensor).copy_(columns.movedim(-1, side.dim))
        behind[side].value = (kernel @ constant).reshape(len(kernel), -1).sum(1)

    with Observer(dense, channel_map, note):
        dense(images)
    with Observer(closed, channel_map, replace):
        closed(images)
    return closed


class Constant:
    """What is added behind a layer; nothing at first. The layer must know it before it is called."""

    def __init__(self, model: nn.Module, side: Side):
        self.value: Tensor | None = None
        model.get_submodule(side.tensor.removesuffix(".weight")).register_forward_hook(self.add)

    def add(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        if self.value is None:
            return None
        return output + self.value.view(-1, *[1] * (output.ndim - 2))
