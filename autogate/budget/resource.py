"""What channels cost: the contract of a resource, and the counting of live channels that resources are made from."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from rewriters import ALWAYS, ChannelMap, Side
from rewriters.labelling import gather


class Resource(ABC):
    """Something that a model has less of when channels die, and that a budget can ask a share of.

    A resource of one's own is a subclass that gives `value` and `price`, built from the channel map and the
    model: `prepare(model, resources={MyResource: 0.5})`. Both are asked for whenever a channel dies, so they
    should take time linear in the number of classes (`SideCounts` does the counting). They have to be the
    same in every process of a distributed run, and the object has to pickle.

    Args:
        size: number of classes.
        whole: what shares are relative to; the resource with every class alive if None.

    Attributes:
        name: what it is called in messages and in `Progress`.
    """

    name = "resource"

    def __init__(self, size: int, whole: float | None = None):
        self.size = size
        self._given_whole = whole

    @abstractmethod
    def value(self, live: Tensor) -> Tensor:
        """What the classes in `live` (bool, shape (classes,), on the CPU) leave of it: 0-dim float64.

        It must not grow when classes die.
        """

    @abstractmethod
    def price(self, live: Tensor) -> Tensor:
        """What one class more or less makes out: beta's second factor in equation 9.

        Returns:
            float64, shape (classes,), nonnegative; defined for dead classes also.
        """

    def drop(self, live: Tensor) -> Tensor:
        """What the value falls by when one class dies and all others stay, float64, shape (classes,).

        The price, unless a subclass knows better.
        """
        return self.price(live)

    @cached_property
    def whole(self) -> float:
        """What shares are relative to."""
        return float(self.value(self._all())) if self._given_whole is None else self._given_whole

    @cached_property
    def start(self) -> float:
        """The share with every class alive: 1, or more where layers were added to the model."""
        return self.share(self._all())

    @cached_property
    def least(self) -> float:
        """The share that is left when every class is dead: pinned channels stay."""
        return self.share(~self._all())

    def share(self, live: Tensor) -> float:
        """The part of the resource that `live` leaves."""
        return float(self.value(live)) / self.whole if self.whole else 1.0

    def _all(self) -> Tensor:
        return torch.ones(self.size, dtype=torch.bool)


End = Side | tuple[int, ...]
"""What is counted: the channels along a side of a kernel, or those of the classes that are named."""


class SideCounts:
    """Counts the live channels along many sides at once.

    Classes that lie on the same sides, equally often, are counted together ("profiles"), so a count costs
    one pass over the classes and one over the few profiles, however many layers there are.

    Args:
        size: number of classes.
        constants: count of each end that no class changes.
        ends: for each end (a side, or what one likes to count), the class of every index along it; `ALWAYS`
            entries are not counted.

    Attributes:
        size: number of classes.
        ends: number of ends.
        profiles: for each profile, the (end, count) pairs that one of its classes lies on.
    """

    def __init__(self, size: int, constants: Sequence[float], ends: Sequence[Sequence[int] | np.ndarray]):
        self.size = size
        self.ends = len(ends)
        self._constant = torch.tensor(constants, dtype=torch.float64)
        profile, self.profiles = gather(size, [np.asarray(classes, np.int64) for classes in ends])
        self._profile = torch.from_numpy(profile)
        entries = [(row, end, count) for row, counts in enumerate(self.profiles) for end, count in counts]
        self._row = torch.tensor([row for row, _, _ in entries], dtype=torch.int64)
        self._end = torch.tensor([end for _, end, _ in entries], dtype=torch.int64)
        self._count = torch.tensor([count for _, _, count in entries], dtype=torch.float64)

    @classmethod
    def along(cls, channel_map: ChannelMap, ends: Sequence[End]) -> SideCounts:
        """One end for each of these, pinned channels counting always."""
        known = channel_map.classes
        constants: list[float] = []
        classes: list[np.ndarray] = []
        for end in ends:
            if isinstance(end, Side) and end not in known:
                constants.append(channel_map.sizes[end])
                classes.append(np.empty(0, np.int64))
            else:
                classes.append(known[end].cpu().numpy() if isinstance(end, Side) else np.array(end, np.int64))
                constants.append(int(np.count_nonzero(classes[-1] == ALWAYS)))
        return cls(channel_map.size, constants, classes)

    def counts(self, live: Tensor) -> Tensor:
        """Live channels on each end: float64, shape (ends,), from bool, shape (classes,)."""
        alive = self._constant.new_zeros(len(self.profiles)).index_add_(0, self._profile, live.to(torch.float64))
        return self._constant.index_add(0, self._end, self._count * alive[self._row])

    def per_class(self, per_end: Tensor) -> Tensor:
        """Sums what each end has per channel over the ends that a class lies on: the price, from slopes.

        Args:
            per_end: float64, shape (ends,).

        Returns:
            float64, shape (classes,).
        """
        sums = per_end.new_zeros(len(self.profiles)).index_add_(0, self._row, self._count * per_end[self._end])
        return self.of_profiles(sums)

    def of_profiles(self, values: Tensor) -> Tensor:
        """Each class's value, shape (classes,), from those of the profiles."""
        return values[self._profile]
