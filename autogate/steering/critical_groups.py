"""Groups of classes without which outputs depend on inputs no more: the stages of a trunk, but no branch beside it."""

from __future__ import annotations

from collections.abc import Sequence

import networkx
import numpy as np

from rewriters import ALWAYS, ChannelMap, Side

_INPUTS = "inputs"


def critical_groups(channel_map: ChannelMap, groups: Sequence[Sequence[int]]) -> set[int]:
    """Which groups every way to an output leads through, by their places in `groups`.

    A layer leads from the groups that it reads to those that it makes. One that makes channels that always stay makes
    an output, or is taken to: what has no class isn't known by its layer. The groups that all ways to it lead through
    are those that dominate it in the graph of layers.

    Args:
        channel_map: its kernels tell the ways.
        groups: the classes of each group; every class is in one.
    """
    group_of = np.empty(channel_map.size, dtype=np.int64)
    for number, classes in enumerate(groups):
        group_of[list(classes)] = number
    ways, outputs = networkx.DiGraph(), []
    ways.add_node(_INPUTS)
    for kernel in channel_map.kernels:
        read = _groups_on(channel_map, kernel.input_side, group_of)
        for made in _groups_on(channel_map, kernel.output_side, group_of):
            target = kernel.weight if made == ALWAYS else made
            outputs += [target] if made == ALWAYS else []
            ways.add_edges_from((_INPUTS if group == ALWAYS else group, target) for group in read)
    before = networkx.immediate_dominators(ways, _INPUTS)
    found: set[int] = set()
    for node in outputs:
        while node in before and before[node] not in (_INPUTS, node, None):
            node = before[node]
            found.add(node)
    return found


def _groups_on(channel_map: ChannelMap, side: Side, group_of: np.ndarray) -> list[int]:
    """Groups that lie on a side, `ALWAYS` for what has no class."""
    if side not in channel_map.classes:
        return [ALWAYS]
    labels = channel_map.classes[side].unique().tolist()
    return list(dict.fromkeys(ALWAYS if label == ALWAYS else int(group_of[label]) for label in labels))
