"""Critical groups: every path from inputs to outputs leads through them. The trunk of a network, not a branch beside
it."""

from __future__ import annotations

from collections.abc import Sequence

import networkx
import numpy as np

from rewriters import ALWAYS, ChannelMap, Side

_INPUTS = "inputs"


def critical_groups(channel_map: ChannelMap, groups: Sequence[Sequence[int]]) -> set[int]:
    """Which groups every path from the inputs to an output leads through, by their places in `groups`.

    A layer is an edge from the groups that it reads to those that it makes. A layer whose output channels always stay
    counts as an output, because pinned channels don't tell which layer reads them. The groups that all paths to it lead
    through are its dominators in the graph of layers.

    Args:
        channel_map: its kernels are the layers.
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
