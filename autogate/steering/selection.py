"""Which of the candidates for death really die.

A step may take more classes to zero than the targets need. The smallest of them die, just enough for the wanted
distance from the targets. The others survive the step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from autogate.budget import ROUNDING, Targets
from autogate.steering.critical_groups import critical_groups
from autogate.steering.schedule import Schedule
from rewriters import ALWAYS, AutogateError, ChannelMap

WIDTH_RESOLUTION = 0.005
"""How closely the uniform width of all layers is determined."""


@dataclass(frozen=True)
class Group:
    """Classes that lie on the same sides, and how many of them die at a time.

    Attributes:
        classes: their indices.
        pace: so many of them die together, so that the widths of all layers stay multiples of `round_to`.
        needed: every path from inputs to outputs leads through it (see `critical_groups`): it doesn't die as a whole.
    """

    classes: tuple[int, ...]
    pace: int = 1
    needed: bool = False


def groups_of(channel_map: ChannelMap, round_to: int) -> list[Group]:
    """The groups of a map, each with the pace that keeps widths multiples of `round_to`.

    If a class holds several channels of a layer (those of an attention head), fewer classes make a multiple.

    Raises:
        AutogateError: `round_to` is not a whole number from 1 up.
    """
    if not (round_to >= 1 and round_to == int(round_to)):
        raise AutogateError(f"round_to is {round_to!r}; it must be a whole number from 1 up.", where="prepare")
    if round_to == 1:
        return [Group(group.classes) for group in channel_map.groups()]
    counts = {
        side: torch.bincount(classes[classes != ALWAYS].cpu(), minlength=channel_map.size)
        for side, classes in channel_map.classes.items()
    }
    groups = []
    for group in channel_map.groups():
        held = {count for side in group.sides for count in counts[side][list(group.classes)].unique().tolist()}
        groups.append(Group(group.classes, math.lcm(*(round_to // math.gcd(round_to, count) for count in held))))
    return groups


class Narrowing:
    """Groups narrowed uniformly, each to its first classes."""

    def __init__(self, groups: Sequence[Group]):
        self._sizes = torch.tensor([len(group.classes) for group in groups], dtype=torch.int64)
        self._paces = torch.tensor([group.pace for group in groups], dtype=torch.int64)
        self._classes = torch.tensor([index for group in groups for index in group.classes], dtype=torch.int64)
        self._group = torch.arange(len(groups)).repeat_interleave(self._sizes)
        begins = torch.cumsum(self._sizes, 0) - self._sizes
        self._place = torch.arange(len(self._classes)) - begins[self._group]

    def counts(self, part: float) -> Tensor:
        """How many classes `part` of each group is: at least one, in whole bundles; int64, shape (groups,)."""
        bundles = torch.ceil(part * self._sizes / self._paces).to(torch.int64).clamp(min=1)
        return torch.minimum(bundles * self._paces, self._sizes)

    def live(self, part: float) -> Tensor:
        """The first classes of each group, `part` of it, live; bool, shape (classes,)."""
        live = torch.empty(len(self._classes), dtype=torch.bool)
        live[self._classes] = self._place < self.counts(part)[self._group]
        return live


def part_alike(narrowing: Narrowing, targets: Targets) -> float | None:
    """The part that each group keeps if all are narrowed uniformly until the targets are met.

    None if they can't be met with every group alive.
    """
    if targets.distance(narrowing.live(0.0)) > 0:
        return None
    if targets.distance(narrowing.live(1.0)) <= 0:
        return 1.0
    alike, too_wide = 0.0, 1.0
    while too_wide - alike > WIDTH_RESOLUTION:
        middle = (alike + too_wide) / 2
        alike, too_wide = (middle, too_wide) if targets.distance(narrowing.live(middle)) <= 0 else (alike, middle)
    return alike


def keep_counts(groups: Sequence[Group], targets: Targets, schedule: Schedule) -> Tensor:
    """How many classes of each group learning leaves alive, int64, shape (groups,).

    The course's `keep` times what is left when all groups are narrowed uniformly until the targets are met; at least
    one class, in whole bundles. If the targets can't be met with every group alive: one bundle of the groups that are
    needed, none of the others.
    """
    narrowing = Narrowing(groups)
    alike = part_alike(narrowing, targets)
    if alike is None:
        return narrowing.counts(0.0) * torch.tensor([group.needed for group in groups])
    return narrowing.counts(schedule.course.keep * alike)


def with_needed(groups: Sequence[Group], channel_map: ChannelMap, targets: Targets) -> list[Group]:
    """The groups, with those marked that are needed if the targets can't be met with every group alive.

    Raises:
        AutogateError: they can't be met with the needed ones alive.
    """
    narrowing = Narrowing(groups)
    if targets.distance(narrowing.live(0.0)) <= 0:
        return list(groups)
    marked, live = _fewest(groups, channel_map)
    shares, wanted = targets.shares(live), targets.wanted()
    pace = max(group.pace for group in groups)
    for name in (name for name, share in shares.items() if share > wanted[name] + ROUNDING):
        raise AutogateError(
            f"{wanted[name]:.3f} of the {name} can't be reached: {shares[name]:.3f} are left with the fewest channels "
            f"that connect inputs to outputs (removed {pace} at a time).",
            remedy="Ask for a larger share, or for a smaller `round_to`.",
        )
    return marked


def fewest_live(groups: Sequence[Group], channel_map: ChannelMap) -> Tensor:
    """The fewest classes that connect inputs to outputs, bool, shape (classes,): no budget can ask for less."""
    return _fewest(groups, channel_map)[1]


def _fewest(groups: Sequence[Group], channel_map: ChannelMap) -> tuple[list[Group], Tensor]:
    needed = critical_groups(channel_map, [group.classes for group in groups])
    marked = [replace(group, needed=number in needed) for number, group in enumerate(groups)]
    live = Narrowing(groups).live(0.0)
    for group in marked:
        live[list(group.classes)] &= group.needed
    return marked, live


@dataclass(frozen=True)
class Deaths:
    """The classes that die in a step.

    Attributes:
        classes: their indices, int64.
        settled: the model is as close to its targets as the classes allow.
    """

    classes: Tensor
    settled: bool = False


@dataclass(frozen=True)
class _Queue:
    """Candidates in the order in which they die, in bundles that die together.

    Attributes:
        order: the classes, int64, bundle after bundle.
        ends: where each bundle ends in `order`, int64, shape (bundles,).
    """

    order: Tensor
    ends: Tensor

    def first(self, bundles: int) -> Tensor:
        """The classes of the first bundles."""
        return self.order[: int(self.ends[bundles - 1])] if bundles else self.order[:0]

    def bundle(self, index: int) -> Tensor:
        begin = int(self.ends[index - 1]) if index else 0
        return self.order[begin : int(self.ends[index])]

    def sums(self, values: Tensor) -> Tensor:
        """A value per class, summed over each bundle."""
        total = torch.cat([values.new_zeros(1), values[self.order].cumsum(0)])
        return total[self.ends] - total[torch.cat([self.ends.new_zeros(1), self.ends[:-1]])]


class Selection:
    """Chooses which candidates die.

    It runs on the CPU, in the rare step in which something dies, and depends on its arguments alone: processes that
    agree on alpha agree on who dies.
    """

    def __init__(self, targets: Targets, schedule: Schedule, groups: Sequence[Group]):
        self.targets = targets
        self.schedule = schedule
        self._tolerance = targets.tolerance(schedule.course.tolerance)
        self._group = torch.zeros(targets.size, dtype=torch.int64)
        for index, group in enumerate(groups):
            self._group[list(group.classes)] = index
        self._pace = torch.tensor([group.pace for group in groups], dtype=torch.int64)
        self._keep = keep_counts(groups, targets, schedule)

    def deaths(self, importance: Tensor, candidates: Tensor, live: Tensor, step: int) -> Deaths:
        """The candidates that die in step number `step`.

        Args:
            importance: the least important candidates die first, shape (classes,). For GDP: |alpha| after the
                gradient step.
            candidates: classes that may die, bool, shape (classes,); all of them are live.
            live: classes that are live before the step, bool, shape (classes,).
            step: number of this step; the first is 1.
        """
        waited = (step / self.schedule.reach_steps - 1) / (self.schedule.course.patience - 1)
        return self.choose(importance, candidates, live, self.schedule.wanted(step), waited)

    def choose(
        self, importance: Tensor, candidates: Tensor, live: Tensor, wanted: float, waited: float = 1.0
    ) -> Deaths:  # fmt: skip
        """The candidates that die so that just the wanted distance from the targets is left.

        Args:
            importance, candidates, live: as for `deaths`.
            wanted: a distance, see `Targets`.
            waited: part of its patience that a run has waited for candidates that fit. From 1 on, it settles for a
                share within the tolerance above the target, or else for the bundle that overshoots least.
        """
        wanted += ROUNDING
        queue = self._bundled(self._in_order(importance, candidates, live), live)
        if self._distance_without(live, queue.order) > wanted:
            return Deaths(queue.order)
        enough = self._shortest_prefix(live, queue, wanted)
        if self._distance_without(live, queue.first(enough)) >= -self._tolerance:
            return Deaths(queue.first(enough))
        return self._land(live, queue, enough - 1, wanted, waited)

    def _in_order(self, importance: Tensor, candidates: Tensor, live: Tensor) -> Tensor:
        """The candidates from the smallest alpha to the largest; of equal ones the dearest first."""
        index = torch.nonzero(candidates).flatten()
        index = index[torch.argsort(self.targets.price(live)[index], descending=True, stable=True)]
        return index[torch.argsort(importance[index], stable=True)]

    def _bundled(self, order: Tensor, live: Tensor) -> _Queue:
        """The candidates that may die, in bundles of their group's pace, by the last one of each bundle.

        The first bundle of a group brings it to a multiple of its pace. What doesn't fill a bundle waits, and
        so does what would take the group below what it keeps.
        """
        groups = self._group[order]
        count = len(self._keep)
        alive, sizes = torch.bincount(self._group[live], minlength=count), torch.bincount(groups, minlength=count)
        most = torch.minimum(sizes, (alive - self._keep).clamp(min=0))
        by_group = torch.argsort(groups, stable=True)
        begins = torch.cumsum(sizes, 0) - sizes
        place = torch.empty_like(order)  # of each candidate among those of its group
        place[by_group] = torch.arange(len(order)) - begins[groups[by_group]]
        pace = self._pace[groups]
        first = (alive % self._pace)[groups]  # candidates in the group's first bundle, if it is a short one
        last = torch.where(place < first, first, first + ((place - first) // pace + 1) * pace) - 1
        dies = last < most[groups]
        # Where the last of a candidate's bundle stands in `order`.
        until = by_group[(begins[groups] + last).clamp(max=max(len(order) - 1, 0))]
        order, until = order[dies], until[dies]
        sequence = torch.argsort(until, stable=True)
        return _Queue(order[sequence], torch.cumsum(until.unique(return_counts=True)[1], 0))

    def _distance_without(self, live: Tensor, dead: Tensor) -> float:
        return self.targets.distance(live.index_fill(0, dead, False))

    def _shortest_prefix(self, live: Tensor, queue: _Queue, wanted: float) -> int:
        """The least number of bundles, in order, whose death brings the distance down to `wanted`."""
        low, high = 0, len(queue.ends)
        while low < high:
            middle = (low + high) // 2
            if self._distance_without(live, queue.first(middle)) <= wanted:
                high = middle
            else:
                low = middle + 1
        return low

    def _land(self, live: Tensor, queue: _Queue, certain: int, wanted: float, waited: float) -> Deaths:
        """Choose the last bundles before the targets: skip those that would overshoot, take cheaper ones.

        If no candidate fits, later steps bring others. But the pressure that brings them is on all classes and should
        not last, so the accepted distance above the target grows from zero to the tolerance until patience is over.
        Then the cheapest bundle dies.
        """
        live = live.index_fill(0, queue.first(certain), False)
        chosen = [queue.first(certain)]
        rest = list(range(certain, len(queue.ends)))
        distance = self.targets.distance(live)
        while distance > wanted:
            after = self._after_each(live, queue, distance)[rest]
            fitting = torch.nonzero(after >= -self._tolerance).flatten()
            if len(fitting) == 0:
                return self._settle_for(chosen, queue, rest, after, distance, waited)
            bundle = queue.bundle(rest.pop(int(fitting[0])))
            chosen.append(bundle)
            live = live.index_fill(0, bundle, False)
            distance = self.targets.distance(live)
        return Deaths(torch.cat(chosen))

    def _after_each(self, live: Tensor, queue: _Queue, distance: float) -> Tensor:
        """The distance after the death of each bundle, float64, shape (bundles,)."""
        return distance - queue.sums(distance - self.targets.distance_without_each(live))

    def _settle_for(
        self, chosen: list[Tensor], queue: _Queue, rest: list[int], after: Tensor, distance: float, waited: float
    ) -> Deaths:
        close = distance <= self._tolerance * min(1.0, waited)
        if not close and waited >= 1 and rest:
            chosen = [*chosen, queue.bundle(rest[int(torch.argmax(after))])]
        return Deaths(torch.cat(chosen), settled=close)
