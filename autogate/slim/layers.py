"""The layers of a model as a slimming found and left them: part of its record, for the summary of a slim model."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rewriters import ChannelMap, Kernel


@dataclass(frozen=True)
class Layer:
    """A convolution or linear layer: its channels left and in all, on both sides, and its multiply-adds."""

    module: str
    inputs: int
    all_inputs: int
    outputs: int
    all_outputs: int
    macs: float
    all_macs: float


def layers_of(channel_map: ChannelMap, live: Tensor) -> tuple[Layer, ...]:
    """The layers of a model, in the order they run.

    Args:
        channel_map: the model's channels.
        live: the classes that stay, bool, shape (classes,), on the CPU.
    """
    return tuple(_layer(channel_map, live, kernel) for kernel in channel_map.kernels)


def _layer(channel_map: ChannelMap, live: Tensor, kernel: Kernel) -> Layer:
    everything = torch.ones_like(live)
    inputs, outputs = (
        (channel_map.width(side, live), channel_map.width(side, everything))
        for side in (kernel.input_side, kernel.output_side)
    )
    macs = channel_map.macs(kernel, live), channel_map.macs(kernel, everything)
    return Layer(kernel.module or kernel.weight, *inputs, *outputs, *macs)
