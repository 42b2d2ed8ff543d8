"""Switchable networks for tests, and the models that their subnets have to equal."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import timm
import torch
from torch import Tensor, nn

import autogate
from autogate import subnets
from benchmarks.parts import randomise_norms


def closed(
    model: nn.Module, example: Tensor, share: float, seed: int, within: Tensor | None = None, **arguments
) -> nn.Module:
    """A copy of the model with gates, of which only a random `share` is open (and only those of `within`)."""
    trial = autogate.prepare(copy.deepcopy(model), example, **arguments)
    bank = autogate.gates(trial)
    live = torch.rand(len(bank.alpha), generator=torch.Generator().manual_seed(seed)) < share
    live = live if within is None else live & within
    with torch.no_grad():
        bank.alpha[~live] = 0
    bank.fold()
    return trial


def fused(model: nn.Module, example: Tensor, shares: Sequence[float], nested: bool = False, **arguments):
    """A switchable copy of the model, and for each of its subnets the slim model that `finalize` makes, the smallest
    first."""
    prepared: list[nn.Module] = []
    within = None
    for seed, share in enumerate(sorted(shares, reverse=True)):
        prepared.append(closed(model, example, share, seed, within, **arguments))
        within = autogate.gates(prepared[-1]).live if nested else None
    found = subnets.of(*prepared, names=[str(number) for number in range(len(prepared))])
    switchable = subnets.fuse(copy.deepcopy(model), found)
    slim = {str(number): autogate.finalize(one, warn=False) for number, one in enumerate(prepared)}
    names = [row.structure.name for row in subnets.status(switchable).rows]
    return switchable, [slim[name] for name in names[:-1]]


def small_net(
    name: str = "test_resnet", side: int = 32, dtype: torch.dtype = torch.float64
) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=4)
    randomise_norms(model)
    return model.to(dtype).eval(), torch.randn(3, 3, side, side, dtype=dtype)
