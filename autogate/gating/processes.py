"""Whether the processes of DistributedDataParallel still have the same gates.

Each process moves its own gates, by the gradients that all share. What one process alone does to its gates, or to the
kernels that hold them, no later step sets right.

Processes don't wait for each other here: within `Join` some step longer than others, and a collective would hang. Each
leaves a note in the store at which the process group has met, and reads those notes of others that are there.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, distributed
from torch.nn.parallel import DistributedDataParallel

from autogate.gating.state import BankState
from rewriters import AutogateError

NOTE_STEPS = 50
"""Steps of the gates between two notes. A note takes a pass over the gated kernels, so this is two hundredths of a
pass a step. No process is this far behind another: each backward waits for all."""

TOLERANCE = 1e-3
"""Differences that processors of two kinds may make by rounding: of sums over alpha (absolute, for each 100 classes)
and over the squares of kernels (relative)."""


class Note(NamedTuple):
    """What a process had after a step: a checksum of the dead classes, weighted sum of alpha, sum of the kernels'
    squares."""

    dead: int
    alpha: float
    kernels: float

    def agrees(self, other: Note, classes: int) -> bool:
        """Whether two processes have the same gates, apart from rounding."""
        return (
            self.dead == other.dead
            and math.isclose(self.alpha, other.alpha, rel_tol=0, abs_tol=TOLERANCE * max(1, classes / 100))
            and math.isclose(self.kernels, other.kernels, rel_tol=TOLERANCE)
        )


def note_of(state: BankState, squares: Callable[[], Tensor]) -> Note:
    """The note of a bank with these buffers.

    Args:
        state: of the bank.
        squares: gives the sum over each class's columns of the kernels' squares, shape (classes,).
    """
    dead = (state.dead > 0).cpu().numpy().tobytes()
    alpha = state.alpha.double()
    weights = torch.linspace(1, 2, len(alpha), dtype=torch.float64, device=alpha.device)
    sums = torch.stack([(alpha * weights).sum(), squares().double().sum()]).tolist()
    return Note(zlib.crc32(dead), *sums)


def differing(notes: Mapping[int, Note], classes: int) -> list[int]:
    """The ranks whose notes are not those of most; of as many, those that don't agree with the lowest rank.

    Kernels with a NaN are equal to nothing, and are told of elsewhere (`finite_weights.py`).
    """
    notes = {rank: notes[rank] for rank in sorted(notes) if not math.isnan(notes[rank].kernels + notes[rank].alpha)}
    alike = [[rank for rank, other in notes.items() if note.agrees(other, classes)] for note in notes.values()]
    most = max(alike, key=len, default=[])
    return [rank for rank in notes if rank not in most]


class _Group(NamedTuple):
    """A process group: its name, and the ranks in it."""

    name: str
    ranks: list[int]


class Processes:
    """Compares the gates of a model in DistributedDataParallel between its processes."""

    def __init__(self) -> None:
        self._group: _Group | None = None
        self._wrapped = False
        self._own: dict[int, Note] = {}
        self._key: str | None = None

    def forward(self) -> None:
        """Called before each forward: whether DistributedDataParallel runs it."""
        # Nobody else knows who wraps a model. Dynamo asks in the same way.
        wrapper = DistributedDataParallel._get_active_ddp_module()
        if wrapper is None:
            return
        self._wrapped, name = True, wrapper.process_group.group_name
        if self._group is None or name != self._group.name:
            self._group = _Group(name, distributed.get_process_group_ranks(wrapper.process_group))
            self._own, self._key = {}, None

    def loaded(self) -> None:
        """Called when a checkpoint was loaded: what was noted is of other gates."""
        self._own = {}
        if self._key is not None and distributed.is_initialized():
            self._exchange([])

    def stepped(self, state: BankState, steps: int, squares: Callable[[], Tensor]) -> None:
        """Called after each step of the gates.

        Args:
            state: the bank's buffers.
            steps: steps that its gates have taken.
            squares: as for `note_of`.

        Raises:
            AutogateError: some processes have other gates than the rest.
        """
        wrapped, self._wrapped = self._wrapped, False
        if not wrapped or steps % NOTE_STEPS or steps in self._own or not distributed.is_initialized():
            return
        if self._group is None or len(self._group.ranks) < 2:
            return
        earlier = max((step for step in self._own if step < steps), default=None)
        self._own = {step: note for step, note in self._own.items() if step == earlier}
        self._own[steps] = note_of(state, squares)
        found = self._exchange(self._group.ranks)
        if earlier is None:
            return
        # Every process has come by its earlier note since, except one that had run out of data.
        notes = {rank: own[earlier] for rank, own in found.items() if earlier in own}
        if others := differing(notes, len(state.alpha)):
            same = next(rank for rank in sorted(notes) if rank not in others)
            raise AutogateError(
                f"at step {earlier} the gates on {_ranks(others)} were not those on rank {same}.",
                where="DistributedDataParallel",
                remedy="Go back to a checkpoint from before, on every process, and set alphas, load states and change "
                "weights in the same way on all of them.",
            )

    def _exchange(self, ranks: list[int]) -> dict[int, dict[int, Note]]:
        """Leave this process's notes for the others; those of these ranks, none before all have left some."""
        me = distributed.get_rank()
        try:
            store = distributed.distributed_c10d._get_default_store()
            if self._key is None and self._group is not None:
                # The first, second, ... model that this group trains. Its processes begin with them in the same order.
                group = f"autogate/{self._group.name}"
                self._key = f"{group}/{store.add(f'{group}/models/{me}', 1)}"
            store.set(f"{self._key}/{me}", json.dumps(list(self._own.items())))
            keys = [f"{self._key}/{rank}" for rank in ranks]
            if not keys or not store.check(keys):
                return {}
            at_once = store.has_extended_api()  # type: ignore[attr-defined]
            texts = store.multi_get(keys) if at_once else [store.get(key) for key in keys]
        except (RuntimeError, ValueError):  # the store has ended, with the process that keeps it
            return {}
        return {
            rank: {step: Note(*note) for step, note in json.loads(text)}
            for rank, text in zip(ranks, texts, strict=True)
        }


def _ranks(ranks: list[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"
