"""Order the channels of a dense model, so that those that stay longest come first. The model computes what it did.

Classes of a group lie on the same sides. If two of them change places on all of these, every kernel, bias and norm of
theirs goes along. So nothing changes, unless the forward treats a channel by its position: adds a ramp, multiplies by a
list of numbers. Whether it does is found out by running it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from rewriters.analysis import Analysis
from rewriters.labelling import ALWAYS, ChannelMap, Group
from rewriters.outputs import EXACT_IN_FLOAT64, Outputs
from rewriters.recording import tensor_slots
from rewriters.slimming.trial_inputs import Inputs
from rewriters.slimming.trial_weights import put_trial_weights
from rewriters.undo_log import UndoLog

ROUNDING = {torch.float64: EXACT_IN_FLOAT64, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""Relative difference of outputs that sums in another order may make, by dtype."""


def order_channels(
    model: nn.Module, analysis: Analysis, places: Tensor, examples: Sequence[Inputs], undo_log: UndoLog
) -> Tensor:
    """Reorder the classes of each group, in the values of all parameters and buffers that they lie on.

    Args:
        model: dense; its tensors are written to.
        analysis: its channels, which are the same afterwards.
        places: what each group is sorted by, int64, shape (classes,); equal ones keep their order.
        examples: inputs that the forward is tried on. Groups that it isn't indifferent to keep their order.
        undo_log: notes the values before.

    Returns:
        int64, shape (classes,): whose channels each class has now.
    """
    groups = [group for group in analysis.channel_map.groups() if len(group.classes) > 1]
    kept = _indifferent(model, analysis, places, examples, groups)
    comes_from = _sorted(analysis.channel_map, kept, places)
    _move(model, analysis.channel_map, comes_from, undo_log)
    return comes_from


def _sorted(channel_map: ChannelMap, groups: Sequence[Group], places: Tensor) -> Tensor:
    """Whose channels each class gets: those of its group in the order of `places`, along the group's first side."""
    comes_from = torch.arange(channel_map.size)
    for group in groups:
        along = channel_map.classes[group.sides[0]]
        members = torch.zeros(channel_map.size, dtype=torch.bool)
        members[list(group.classes)] = True
        there = along[along != ALWAYS]
        there = torch.tensor(list(dict.fromkeys(there[members[there]].tolist())))
        comes_from[there] = there[torch.argsort(places[there], stable=True)]
    return comes_from


def _move(model: nn.Module, channel_map: ChannelMap, comes_from: Tensor, undo_log: UndoLog) -> None:
    """Write each class's values to where they go."""
    moves: dict[str, list[tuple[int, Tensor]]] = {}
    for side, classes in channel_map.classes.items():
        sources = _sources(classes, comes_from)
        if not torch.equal(sources, torch.arange(len(classes))):
            moves.setdefault(side.tensor, []).append((side.dim, sources))
    done: set[int] = set()
    for name, _, _, tensor in list(tensor_slots(model)):
        if name in moves and id(tensor) not in done:
            done.add(id(tensor))
            moved = tensor.detach()
            for dim, sources in moves[name]:
                moved = moved.index_select(dim, sources.to(tensor.device))
            undo_log.write(tensor, moved)


def _sources(classes: Tensor, comes_from: Tensor) -> Tensor:
    """For each index of a side, the index whose values it gets: of a class's several indices the first from the first,
    and so on."""
    if (classes == ALWAYS).all():
        return torch.arange(len(classes))
    order = torch.argsort(classes, stable=True)  # the indices of each class, one class after another
    labels, counts = classes[order].unique_consecutive(return_counts=True)
    starts = torch.cat([counts.new_zeros(1), counts.cumsum(0)[:-1]])
    first = dict(zip(labels.tolist(), starts.tolist(), strict=True))
    sources = torch.arange(len(classes))
    for label, start, count in zip(labels.tolist(), starts.tolist(), counts.tolist(), strict=True):
        if label != ALWAYS:
            at = first[int(comes_from[label])]
            sources[order[start : start + count]] = order[at : at + count]
    return sources


class _Trial(NamedTuple):
    """Inputs, what a model returned for them, and how far another order may be off."""

    inputs: Inputs
    wanted: Outputs
    allowed: float


def _indifferent(
    model: nn.Module, analysis: Analysis, places: Tensor, examples: Sequence[Inputs], groups: Sequence[Group]
) -> list[Group]:
    """The groups whose order the forward is indifferent to. A weight that is zero now must not hide that it isn't."""
    undo_log = UndoLog()
    everything = torch.ones(analysis.channel_map.size, dtype=torch.bool)
    modes = (False, True) if analysis.trains_otherwise else (False,)
    try:
        put_trial_weights(model, analysis, everything, undo_log)
        outputs = [(inputs, Outputs.of(model, *inputs, training=mode)) for inputs in examples for mode in modes]
        trials = [
            _Trial(inputs, wanted, max((ROUNDING.get(value.dtype, 0.0) for value in wanted.values), default=0.0))
            for inputs, wanted in outputs
        ]
        return _bisected(model, analysis.channel_map, places, trials, list(groups))
    finally:
        undo_log.undo()


def _bisected(
    model: nn.Module, channel_map: ChannelMap, places: Tensor, trials: Sequence[_Trial], groups: list[Group]
) -> list[Group]:
    undo_log = UndoLog()
    try:
        _move(model, channel_map, _sorted(channel_map, groups, places), undo_log)
        fine = all(one.wanted.error(model, *one.inputs, one.allowed) <= one.allowed for one in trials)
    finally:
        undo_log.undo()
    if fine or len(groups) <= 1:
        return groups if fine else []
    middle = len(groups) // 2
    halves = (groups[:middle], groups[middle:])
    return [group for half in halves for group in _bisected(model, channel_map, places, trials, half)]
