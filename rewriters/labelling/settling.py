"""Decide what has to wait until all labels of a model have met.

- A tensor can only lose whole slices. Where labels vary along two of its dimensions (groups x width after a view),
  whole rows or whole columns die: the longer dimension stays free, and labels are merged along the other.
- Some tensors have one element for each position in a head: a rotary table in a buffer, the weight of an RMS norm
  written by hand. They meet labels that vary along more dimensions than their own, and merging them at once would
  couple all heads (`DeferredMerge`). If the positions in a head are one class by now, such a tensor is pinned and the
  heads stay free. Otherwise both are merged, one for one.
- The layers and directions of a recurrent module share one width.
- A statistic of a kernel may rely on dead columns being zero: if no gate makes them zero, they are pinned.

Why do heads die and not positions, if a head has more positions than there are heads? A grid of heads x positions can
lose rows or columns, and a label has one class, so one of the two is chosen for all that is coupled (q, k, v are one
view of one kernel in most models). The columns would leave more classes. But a position in q and k can only be removed
if it is zero there. That takes a gate where it is computed and not where it is read, through rotations and norms. A
head takes its softmax along, which costs as many steps however narrow the head is. And the scale, 1 / sqrt(width) by
definition, stays what it was. To offer both, an index would have to be removed when either of two classes dies.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from torch import nn

from rewriters.labelling.channel_map import ALWAYS, Side
from rewriters.labelling.propagate import Labelling
from rewriters.labelling.rules import DeferredMerge
from rewriters.recording import named_modules


def _merge_deferred(labelling: Labelling) -> None:
    """Merge labels that vary along several dimensions with those that vary along some of these, one for one.

    If the former are the same along the shared dimensions by now (the positions in a head, because whole heads die),
    the latter (a table of positions, say) are pinned instead.
    """
    unlike = []
    for met in labelling.findings.deferred_merges:
        if _alike(labelling, met):
            reason = "one element for each position in a head, and only whole heads can be removed"
            labelling.space.pin(met.narrow, met.module, met.op, reason)
        else:
            unlike.append(met)
    for met in unlike:
        labelling.space.merge(met.wide, met.narrow)


def _alike(labelling: Labelling, met: DeferredMerge) -> bool:
    """Whether the wide labels vary along none of the narrow labels' dimensions, but along others."""
    roots, narrow = labelling.space.roots()[met.wide.numpy()], met.narrow.shape
    first = roots[tuple(slice(0, 1 if size > 1 else None) for size in narrow)]
    return bool((roots == first).all() and (first != first.flat[0]).any())


def merge_grids(labelling: Labelling) -> None:
    """Merge labels that vary along several dimensions of one tensor, so that whole rows or columns die.

    Of the dimensions in which the labels still vary, the longest stays free (the first of equals: heads before the
    positions in them).
    """
    _merge_deferred(labelling)
    seen: set[bytes] = set()
    for grid in labelling.findings.grids:
        roots = labelling.space.roots()[grid.numpy()]
        key = hashlib.blake2b(np.ascontiguousarray(roots).data).digest() + str(roots.shape).encode()
        if key in seen:
            continue
        seen.add(key)
        free = [d for d, size in enumerate(roots.shape) if size > 1 and (roots != roots.take([0], d)).any()]
        if len(free) > 1:
            kept = max(free, key=lambda dim: roots.shape[dim])
            labelling.space.merge_along(grid, [dim for dim in free if dim != kept])


def tie_recurrent_layers(labelling: Labelling, model: nn.Module) -> None:
    """Couple the hidden units of the layers and directions of each recurrent module, which has one width."""
    for path, module in named_modules(model):
        if isinstance(module, nn.RNNBase):
            names = [f"{path}.{name}".lstrip(".") for name in module._flat_weights_names]
            sides = [Side(name, 1) for name in names if "weight_hh" in name and Side(name, 1) in labelling.space.blocks]
            for side in sides[1:]:
                labelling.space.merge(labelling.space.labels_of(sides[0]), labelling.space.labels_of(side))
            if module.proj_size:
                labelling.pin_tensors(names, "its hidden units are projected")


def pin_ungated_zeros(labelling: Labelling) -> None:
    """Pin channels that a statistic of a kernel needs to be zero once they are dead, if no gate makes them zero."""
    for zeroed in labelling.findings.zeroed:
        side = labelling.space.side_of(zeroed.labels)
        if side not in labelling.findings.gated:
            labelling.space.pin(zeroed.labels, zeroed.module, zeroed.op, "normalised over its channels")


def pin_ungated_statistics(labelling: Labelling) -> None:
    """Pin channels that a statistic looks at and that no gate can close, which says why they stay."""
    class_of = labelling.class_of_label()
    for statistic in labelling.findings.statistics:
        stays = (class_of[statistic.labels.numpy()] == ALWAYS) & ~labelling.pinned(statistic.labels)
        if stays.any():
            labels = statistic.labels[torch.from_numpy(stays)]
            labelling.space.pin(labels, statistic.module, statistic.op, statistic.reason)
