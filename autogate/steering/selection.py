"""Which of the candidates for death really die.

A step may take more classes to zero than the targets need. The smallest of them die, just enough for the wanted
distance from the targets. The others survive the step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from autogate.budget import ROUNDING, Targets
from autogate.steering.groups import Group, places
from autogate.steering.least_widths import keep_counts
from autogate.steering.limits import excess_of
from autogate.steering.schedule import Schedule


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
        self._group, _ = places(groups)
        self._pace = torch.tensor([group.pace for group in groups], dtype=torch.int64)
        self._keep = keep_counts(groups, targets, schedule)
        self._widest = torch.tensor([group.widest for group in groups], dtype=torch.int64)
        self._excess = excess_of(groups)

    def distance(self, live: Tensor) -> float:
        """The way to go: 1 at the start, 0 or less once the targets and the upper limits are met."""
        distance = self.targets.distance(live)
        return distance if self._excess is None else max(distance, self._excess.distance(live))

    def price(self, live: Tensor) -> Tensor:
        """The price of each class, as `Targets.price`. Classes above an upper limit cost too, as long as they are."""
        price = self.targets.price(live)
        if self._excess is None or (above := self._excess.distance(live)) <= 0:
            return price
        below = max(self.targets.distance(live), 0.0)
        return (below * price + above * self._excess.price(live)) / (below + above)

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
        """The candidates that die so that just the wanted distance is left.

        Args:
            importance, candidates, live: as for `deaths`.
            wanted: a distance, see `distance`.
            waited: part of its patience that a run has waited for candidates that fit. From 1 on, it settles for a
                share within the tolerance above the target, or else for the bundle that overshoots least.
        """
        above = self._above_limits(importance, candidates, live, wanted)
        live = live.index_fill(0, above, False)
        deaths = self._towards_targets(importance, candidates & live, live, wanted + ROUNDING, waited)
        left = live.index_fill(0, deaths.classes, False)
        settled = deaths.settled and (self._excess is None or self._excess.distance(left) <= 0)
        return Deaths(torch.cat([above, deaths.classes]), settled)

    def _above_limits(self, importance: Tensor, candidates: Tensor, live: Tensor, wanted: float) -> Tensor:
        """The candidates that die so that groups come down to their upper limits, as far as wanted."""
        if self._excess is None or self._excess.distance(live) <= wanted:
            return torch.zeros(0, dtype=torch.int64)
        order = self._in_order(importance, candidates, live)
        queue = self._bundled(order, live, torch.maximum(self._keep, self._widest))
        return queue.first(self._shortest_prefix(live, queue, wanted, self._excess))

    def _towards_targets(
        self, importance: Tensor, candidates: Tensor, live: Tensor, wanted: float, waited: float
    ) -> Deaths:  # fmt: skip
        """The candidates that die so that just the wanted distance from the targets is left."""
        queue = self._bundled(self._in_order(importance, candidates, live), live, self._keep)
        if self._distance_without(live, queue.order) > wanted:
            return Deaths(queue.order)
        enough = self._shortest_prefix(live, queue, wanted, self.targets)
        if not enough:  # what limits ask for has brought it below
            return Deaths(queue.first(0))
        if self._distance_without(live, queue.first(enough)) >= -self._tolerance:
            return Deaths(queue.first(enough))
        return self._land(live, queue, enough - 1, wanted, waited)

    def _in_order(self, importance: Tensor, candidates: Tensor, live: Tensor) -> Tensor:
        """The candidates from the smallest alpha to the largest; of equal ones the dearest first."""
        index = torch.nonzero(candidates).flatten()
        index = index[torch.argsort(self.targets.price(live)[index], descending=True, stable=True)]
        return index[torch.argsort(importance[index], stable=True)]

    def _bundled(self, order: Tensor, live: Tensor, keep: Tensor) -> _Queue:
        """The candidates that may die, in bundles of their group's pace, by the last one of each bundle.

        The first bundle of a group brings it to a multiple of its pace. What doesn't fill a bundle waits, and
        so does what would take the group below `keep` (int64, shape (groups,)).
        """
        groups = self._group[order]
        count = len(keep)
        alive, sizes = torch.bincount(self._group[live], minlength=count), torch.bincount(groups, minlength=count)
        most = torch.minimum(sizes, (alive - keep).clamp(min=0))
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

    def _shortest_prefix(self, live: Tensor, queue: _Queue, wanted: float, targets: Targets) -> int:
        """The least number of bundles, in order, whose death brings the distance down to `wanted`."""
        low, high = 0, len(queue.ends)
        while low < high:
            middle = (low + high) // 2
            if targets.distance(live.index_fill(0, queue.first(middle), False)) <= wanted:
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
