"""Decide what has to wait until all labels of a model have met.

- A tensor can only lose whole slices. Where labels vary along two of its dimensions (groups x width after a view),
  whole rows or whole columns die: the longer dimension stays free, and labels are merged along the other.
- Where something meets labels that vary along more dimensions than its own (what there is one of for each place in a
  head, a rotary table, say), merging them at once would couple all heads. If the places in a head are one class by now,
  it is pinned and the heads stay free. Otherwise both are merged, one for one.
- The layers and directions of a recurrent module share one width.
- A statistic of a kernel may rely on dead columns being zero: where no gate makes them so, they are pinned.
"""

from __future__ import annotations

import hashlib

import numpy as np
from torch import nn

from rewriters.labelling.channel_map import Side
from rewriters.labelling.propagate import Labelling
from rewriters.labelling.rules import DeferredMerge


def _merge_deferred(labelling: Labelling) -> None:
    """Let labels that vary along more dimensions than those they met go with these, one for one.

    Where they are alike along the shared dimensions by now (the places in a head, for whole heads go), none
    of them could: what they met stays instead, a table of positions, say.
    """
    unlike = []
    for met in labelling.findings.deferred_merges:
        if _alike(labelling, met):
            reason = "one for each place in a head, and whole heads die"
            labelling.space.pin(met.narrow, met.module, met.op, reason)
        else:
            unlike.append(met)
    for met in unlike:
        labelling.space.merge(met.wide, met.narrow)


def _alike(labelling: Labelling, met: DeferredMerge) -> bool:
    """Whether the wide labels vary along none of the narrow ones' dimensions, and along others."""
    roots, narrow = labelling.space.roots()[met.wide.numpy()], met.narrow.shape
    first = roots[tuple(slice(0, 1 if size > 1 else None) for size in narrow)]
    return bool((roots == first).all() and (first != first.flat[0]).any())


def merge_grids(labelling: Labelling) -> None:
    """Where labels vary along several dimensions of one tensor, let whole rows or columns die.

    A tensor can only lose whole slices: of the dimensions in which its labels still vary, the longest
    keeps its freedom (the first of equals: heads before what is in them).
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
    """Let the layers and directions of one recurrent module lose the same hidden units: it has one width."""
    for path, module in model.named_modules():
        if isinstance(module, nn.RNNBase):
            names = [f"{path}.{name}".lstrip(".") for name in module._flat_weights_names]
            sides = [Side(name, 1) for name in names if "weight_hh" in name and Side(name, 1) in labelling.space.blocks]
            for side in sides[1:]:
                labelling.space.merge(labelling.space.labels_of(sides[0]), labelling.space.labels_of(side))
            if module.proj_size:
                labelling.pin_tensors(names, "its hidden units are projected")


def pin_ungated_zeros(labelling: Labelling) -> None:
    """Keep the channels that a statistic of a kernel counts on to be zero where no gate sees to it."""
    for zeroed in labelling.findings.zeroed:
        side = labelling.space.side_of(zeroed.labels)
        if side not in labelling.findings.gated:
            labelling.space.pin(zeroed.labels, zeroed.module, zeroed.op, "normalised over its channels")
