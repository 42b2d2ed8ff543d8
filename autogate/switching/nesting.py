"""Order a model's channels so that each subnet has the first ones of every group."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from autogate.slim import AnalysisOptions
from autogate.switching.structure import Structure
from rewriters import Analysis, AutogateError, UndoLog
from rewriters.slimming import order_channels


def in_order(
    model: nn.Module, analysis: Analysis, structures: Sequence[Structure], options: AnalysisOptions, undo_log: UndoLog
) -> list[Structure]:
    """Order the channels of a dense model by the subnets that have them, and then by their deaths.

    Args:
        model: its tensors are written to; it computes what it did.
        analysis: its channels.
        structures: the subnets', the smallest first.
        options: how the model was analysed.
        undo_log: notes the values before.

    Returns:
        The structures, of the model as it is now.

    Raises:
        AutogateError: a subnet is not a part of the next.
    """
    channel_map = analysis.channel_map
    lives = [one.live(channel_map) for one in structures]
    deaths = [one.died(channel_map) for one in structures]
    for at, (narrow, wide) in enumerate(itertools.pairwise(lives)):
        if (narrow & ~wide).any():
            only = torch.nonzero(narrow & ~wide).flatten().tolist()
            raise AutogateError(
                f"the subnet {structures[at].name!r} has {len(only)} classes of channels that the next wider one, "
                f"{structures[at + 1].name!r}, lacks, so they aren't nested.",
                where=channel_map.describe(only[:1]),
                remedy='Fuse them without nested=True, or find nested ones, as subnets.find(..., by="l1") does.',
            )
    comes_from = order_channels(model, analysis, _places(lives, deaths), (options.inputs, *options.others), undo_log)
    return [
        Structure.of(one.name, channel_map, live[comes_from], one.shares, died[comes_from])
        for one, live, died in zip(structures, lives, deaths, strict=True)
    ]


def _places(lives: Sequence[Tensor], deaths: Sequence[Tensor]) -> Tensor:
    """A number for each class: small ones are in more subnets; among equals those that died last come first."""
    lacking = torch.stack([~live for live in lives]).sum(0)  # how many subnets lack the class
    latest = torch.zeros_like(lacking)
    for number, died in enumerate(deaths, 1):
        latest = torch.where(lacking == number, died, latest)
    return lacking * (int(latest.max()) + 1) - latest
