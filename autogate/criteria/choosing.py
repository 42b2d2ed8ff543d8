"""From scores to the classes that close: the smallest, just enough of them, by the selection that training uses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from autogate.steering import Deaths, Group, Selection

Allocation = Literal["global", "uniform"]
"""Which classes are compared: all of the model, or only those of one group, so that all groups narrow alike."""

PORTIONS = 20
"""Prices change while classes close (a layer's FLOPs depend on the widths of others), so they close in portions."""


def choose(
    selection: Selection, groups: Sequence[Group], scores: Tensor, live: Tensor, allocation: Allocation,
    over_price: bool,
) -> Deaths:  # fmt: skip
    """Choose the classes that close so that the targets of the selection are met.

    Args:
        selection: knows the targets, least widths and bundles.
        groups: the classes of each group.
        scores: one number a class, shape (classes,); an infinite one stays.
        live: bool, shape (classes,), on the CPU.
        allocation: which classes are compared.
        over_price: compare scores divided by what a class costs.

    Returns:
        The classes, first those that are missed least.
    """
    if allocation == "uniform":
        scores = _places(scores, live, groups)
    left, chosen = live.clone(), []
    start = selection.distance(live)
    deaths = Deaths(torch.zeros(0, dtype=torch.int64))
    for portion in range(1, PORTIONS + 1):
        if selection.distance(left) <= 0:
            break
        price = selection.price(left) if over_price and allocation == "global" else torch.ones_like(scores)
        importance = scores / price.clamp(min=torch.finfo(price.dtype).tiny)
        candidates = left & torch.isfinite(scores)
        deaths = selection.choose(importance, candidates, left, start * (1 - portion / PORTIONS))
        chosen.append(deaths.classes[torch.argsort(importance[deaths.classes], stable=True)])
        left = left.index_fill(0, deaths.classes, False)
    return Deaths(torch.cat([torch.zeros(0, dtype=torch.int64), *chosen]), deaths.settled)


def _places(scores: Tensor, live: Tensor, groups: Sequence[Group]) -> Tensor:
    """The place of each class in the order of its group, as a part of the group; infinite scores stay so."""
    places = torch.empty_like(scores)
    for group in groups:
        classes = torch.tensor(group.classes)
        order = torch.argsort(torch.where(live[classes], scores[classes], -torch.inf), stable=True)
        places[classes[order]] = torch.arange(1, len(classes) + 1, dtype=scores.dtype) / len(classes)
    return torch.where(torch.isinf(scores), scores, places)
