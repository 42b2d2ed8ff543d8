"""Read the channel map off the labels of a model."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from rewriters.labelling.channel_map import ALWAYS, ChannelMap, Kernel, Pin, Side
from rewriters.labelling.labels import give_members
from rewriters.labelling.propagate import Labelling
from rewriters.labelling.rules import KernelCall


def read_channel_map(labelling: Labelling, samples: int = 1) -> ChannelMap:
    """The partition of channels that follows from what was merged and pinned so far.

    Args:
        labelling: of one or more captured graphs.
        samples: how many samples the captured forward ran on; costs are for one.
    """
    class_of = labelling.class_of_label()
    classes: dict[Side, Tensor] = {}
    alike: dict[bytes, Tensor] = {}  # kernel, bias and norm of a layer have the same classes, and share one tensor
    for side, (start, size) in labelling.space.blocks.items():
        labels = class_of[start : start + size]
        if labels.max() != ALWAYS:
            found = alike.get(labels.tobytes())
            classes[side] = torch.from_numpy(labels.astype(np.int64)) if found is None else found
            alike[labels.tobytes()] = classes[side]
    kernels = _sum_calls([_counted(call, class_of) for call in labelling.findings.kernels], samples)
    sizes = {side: _size(labelling, side) for kernel in kernels for side in (kernel.input_side, kernel.output_side)}
    gated = tuple(k.input_side for k in kernels if k.input_side in labelling.findings.gated and k.input_side in classes)
    size, heads = int(class_of.max(initial=ALWAYS)) + 1, _heads(labelling, class_of)
    return ChannelMap(size, classes, sizes, kernels, gated, _pins(labelling), heads=heads)


def _heads(labelling: Labelling, class_of: np.ndarray) -> frozenset[int]:
    """The classes of heads that have several places: where each has one, it is a channel like others."""
    found = {label for labels in labelling.findings.heads for label in np.unique(class_of[labels.numpy()]).tolist()}
    wide: set[int] = set()
    for start, size in labelling.space.blocks.values():
        labels, counts = np.unique(class_of[start : start + size], return_counts=True)
        wide.update(labels[counts > 1].tolist())
    return frozenset((found & wide) - {ALWAYS})


def _size(labelling: Labelling, side: Side) -> int:
    return labelling.space.blocks[side][1] if side in labelling.space.blocks else 1


def _pins(labelling: Labelling) -> tuple[Pin, ...]:
    """The pins with the sides of their labels' classes; those of the same module, op and reason are one."""
    roots = labelling.space.roots()
    noted: dict[tuple[str, str, str], list[Tensor]] = {}
    for note in labelling.space.notes:
        noted.setdefault((note.module, note.op, note.reason), []).append(note.labels)
    pins = []
    for place, labels in noted.items():
        hit = np.zeros(labelling.space.count, bool)
        for of_note in labels:
            hit[roots[of_note.numpy()]] = True
        give_members(hit, roots)
        sides = [side for side, (at, size) in labelling.space.blocks.items() if hit[at : at + size].any()]
        pins += [Pin(*place, tuple(sides))] if sides else []
    return tuple(pins)


def same_classes(one: Labelling, other: Labelling) -> bool:
    """Whether two labellings of one model couple the same indices of its tensors and pin the same ones."""
    if one.space.blocks.keys() != other.space.blocks.keys():
        return False
    here, there = (
        each.class_of_label()[np.concatenate([each.space.labels_of(side).numpy() for side in one.space.blocks])]
        for each in (one, other)
    )
    pairs = np.unique(np.stack([here, there]), axis=1)
    alike = all(len(np.unique(own)) == pairs.shape[1] for own in (here, there))
    return alike and np.array_equal(here == ALWAYS, there == ALWAYS)


def keeps_classes(labelling: Labelling, other: Labelling) -> bool:
    """Whether all labels of `other`, which this labelling was forked from, are still in the same classes."""
    return bool(np.array_equal(labelling.class_of_label()[: other.space.count], other.class_of_label()))


def _counted(call: KernelCall, class_of: np.ndarray) -> Kernel:
    """The kernel with the classes that it repeats for, each in proportion to the rows that it has."""
    if call.rows is None:
        return call.kernel
    classes, times = np.unique(class_of[call.rows.numpy()], return_counts=True)
    if (classes == ALWAYS).all():
        return call.kernel
    repeats = tuple(np.repeat(classes, times // np.gcd.reduce(times)).tolist())
    return replace(
        call.kernel, macs=call.kernel.macs / len(repeats), outputs=call.kernel.outputs / len(repeats), repeats=repeats
    )


def _once(kernel: Kernel) -> Kernel:
    """The kernel with the costs of all its repeats."""
    times = len(kernel.repeats) or 1
    return replace(kernel, macs=kernel.macs * times, outputs=kernel.outputs * times, repeats=())


def _sum_calls(kernels: list[Kernel], samples: int) -> tuple[Kernel, ...]:
    """One entry a weight, with the summed costs of its calls for one sample.

    If the calls repeat for different channels, no single product gives the costs of all: all repeats are then counted
    as if their channels stayed.
    """
    summed: dict[tuple[str, int], Kernel] = {}
    for kernel in kernels:
        key = (kernel.weight, kernel.input_dim)
        before = summed.get(key, replace(kernel, macs=0.0, outputs=0.0))
        if kernel.macs and before.macs and kernel.repeats != before.repeats:
            kernel, before = _once(kernel), _once(before)
        summed[key] = replace(
            before,
            macs=before.macs + kernel.macs / samples,
            outputs=before.outputs + kernel.outputs / samples,
            mixes=before.mixes or kernel.mixes,
            repeats=kernel.repeats if kernel.macs else before.repeats,
        )
    return tuple(summed.values())
