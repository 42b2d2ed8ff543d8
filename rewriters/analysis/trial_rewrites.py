"""Rewrite every traced forward for trial patterns of dead classes, and pin what can't be rewritten."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor, fx, nn

from rewriters.forwards import CannotResizeError, LabelMask, TracedForward
from rewriters.labelling import ALWAYS, Labelling, distinct, empty_ends, picked
from rewriters.recording import all_tensors, collect, tensors_at, tensors_of


def trial_pattern(size: int, seed: int) -> Tensor:
    """A reproducible random pattern of live classes, half of them on average; bool of shape (size,)."""
    return torch.rand(size, generator=torch.Generator().manual_seed(seed)) < 0.5


def _staggered_pattern(labelling: Labelling, class_of: np.ndarray) -> Tensor:
    """A pattern that leaves sides of the same length with different numbers of channels; bool of shape (classes,).

    In a random pattern two sides may be left with equally many channels. Then a size that is read from one and used for
    the other is right by chance.
    """
    live = torch.ones(int(class_of.max(initial=ALWAYS)) + 1, dtype=torch.bool)
    sides = (class_of[start : start + length] for start, length in _removable_blocks(labelling, class_of))
    seen: set[bytes] = set()
    for side in {side.tobytes(): side for side in sides}.values():
        classes, _ = distinct(side)
        if classes.tobytes() not in seen and len(classes):
            live[classes[: len(seen) % len(classes)]] = False
            seen.add(classes.tobytes())
    return live


def _removable_blocks(labelling: Labelling, class_of: np.ndarray) -> list[tuple[int, int]]:
    """(start, length) of the labels of each side on which a class can be removed."""
    blocks = labelling.space.blocks.values()
    return [(start, length) for start, length in blocks if (class_of[start : start + length] != ALWAYS).any()]


def _nowhere_empty(labelling: Labelling, class_of: np.ndarray, live: Tensor) -> Tensor:
    """Live classes, and the first class of every side that would be empty: a slim layer keeps one channel."""
    blocks = _removable_blocks(labelling, class_of)
    kept = live.clone()
    if blocks:
        ends = np.concatenate([np.arange(start, start + length) for start, length in blocks])
        stays = np.append(live.numpy(), True)[class_of[ends]]
        for end in empty_ends([length for _, length in blocks], stays):
            kept[class_of[blocks[end][0]]] = True
    return kept


def trial_masks(labelling: Labelling, class_of: np.ndarray) -> Iterator[LabelMask]:
    """Masks of trial patterns, for the classes of all labels."""
    size = int(class_of.max(initial=ALWAYS)) + 1
    for live in (trial_pattern(size, 0), trial_pattern(size, 1), _staggered_pattern(labelling, class_of)):
        yield LabelMask(labelling.stays(_nowhere_empty(labelling, class_of, live)))


def pin_unresizable(labelling: Labelling, forwards: Sequence[TracedForward]) -> None:
    """Rewrite every traced forward for trial patterns, and pin what has no form for them.

    Of equal forwards (the attention of each block) one is tried; if it fails, all of them are.
    """
    settled = not forwards
    while not settled:
        settled = True
        class_of = labelling.class_of_label()
        unlike = {likeness(traced, class_of): traced for traced in forwards}
        for mask in trial_masks(labelling, class_of):
            refused = any(_refusal(traced, mask) for traced in unlike.values())
            collect()
            if not refused:
                continue
            settled = False
            for traced in forwards:
                error = _refusal(traced, mask)
                if error is not None:
                    _pin_refused(labelling, traced, error, class_of)
            break


def _refusal(traced: TracedForward, mask: LabelMask) -> CannotResizeError | None:
    try:
        traced.resize(mask)
    except CannotResizeError as error:
        return error
    return None


def likeness(traced: TracedForward, class_of: np.ndarray) -> tuple[str, str, bytes]:
    """A key that is equal for forwards of the same code and numbers, on tensors with equal shapes and coupling."""
    in_order = np.full(class_of.max(initial=ALWAYS) + 2, -1)  # classes renumbered in the order in which they come
    in_order[ALWAYS] = 0
    coupled, shapes, count = hashlib.blake2b(), [], 1
    for tensor in all_tensors(traced.graph):
        own = traced.known[id(tensor)].layers if id(tensor) in traced.known else ()
        shapes.append((tuple(tensor.shape), [tuple(layer.shape) for layer in own]))
        for layer in own:
            classes = picked(class_of, layer.numpy().ravel())
            if (classes == ALWAYS).all():
                coupled.update(b"all stay")
                continue
            found, first = np.unique(classes, return_index=True)
            new = found[first.argsort()]
            new = new[in_order[new] < 0]
            in_order[new] = np.arange(count, count + len(new))
            count += len(new)
            coupled.update(in_order[classes])
    read = [node.meta["val"] for node in traced.graph.find_nodes(op="get_attr")]
    numbers = [value for value in read if not isinstance(value, (Tensor, nn.Module))]
    return str(traced.graph), repr((shapes, numbers)), coupled.digest()


def _pin_refused(labelling: Labelling, traced: TracedForward, error: CannotResizeError, class_of: np.ndarray) -> None:
    """Pin the channels at a node that has no form for fewer of them; `class_of` has the classes that it was tried with.

    If these are pinned already, a size that was read elsewhere (from the forward's input, say) is wrong. Then the
    tensors that the node's sizes were read from are pinned too, or at last all that the forward touches.
    """
    for tensors in (tensors_at(error.node), _sizes_read(error.node), all_tensors(traced.graph)):
        labelling.pin_values(tensors, traced.known, traced.path, str(error.node.target), error.cause)
        if not np.array_equal(labelling.class_of_label(), class_of):
            return
    raise error


def _sizes_read(node: fx.Node) -> list[Tensor]:
    """The tensors that anything other than a tensor was read from on the way to `node`."""
    seen: set[fx.Node] = set()
    open_ends, tensors = [node], []
    while open_ends:
        at = open_ends.pop()
        if at not in seen:
            seen.add(at)
            open_ends.extend(at.all_input_nodes)
            if not tensors_of(at.meta["val"]):
                tensors.extend(tensors_at(at))
    return tensors
