"""The contract of a resource, and the counting of live channels that resources are built from."""

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
    """Something that a model has less of when channels die, and that a budget can limit to a share.

    A resource of your own is a subclass with `value` and `price`, built from the channel map and the model:
    `prepare(model, resources={MyResource: 0.5})`. Both methods are called whenever a channel dies, so they should take
    time linear in the number of classes (`SideCounts` does the counting). They have to give the same results in every
    process of a distributed run, and the object has to be picklable.

    Args:
        size: number of classes.
        whole: the value that shares are relative to; the value with every class alive if None.

    Attributes:
        name: its name in messages and in `Progress`.
    """

    name = "resource"

    def __init__(self, size: int, whole: float | None = None):
        self.size = size
        self._given_whole = whole

    @abstractmethod
    def value(self, live: Tensor) -> Tensor:
        """The amount that is left if only the classes in `live` are alive. It must not grow when classes die.

        Args:
            live: bool, shape (classes,), on the CPU.

        Returns:
            float64, 0-dim.
        """

    @abstractmethod
    def price(self, live: Tensor) -> Tensor:
        """The amount that one class more or less makes a difference of: the second factor of beta in equation 9.

        Args:
            live: bool, shape (classes,), on the CPU.

        Returns:
            float64, shape (classes,), nonnegative; defined for dead classes too.
        """

    def drop(self, live: Tensor) -> Tensor:
        """The amount by which the value falls if one class dies and all others stay.

        It is the price, unless a subclass overrides it.

        Args:
            live: bool, shape (classes,), on the CPU.

        Returns:
            float64, shape (classes,).
        """
        return self.price(live)

    @cached_property
    def whole(self) -> float:
        """The value that shares are relative to."""
        return float(self.value(self._all())) if self._given_whole is None else self._given_whole

    @cached_property
    def start(self) -> float:
        """The share with every class alive: 1, or more if layers were added to the model."""
        return self.share(self._all())

    @cached_property
    def least(self) -> float:
        """The share with every class dead: pinned channels stay."""
        return self.share(~self._all())

    def share(self, live: Tensor) -> float:
        """The share of the resource that is left if only the classes in `live` are alive."""
        return float(self.value(live)) / self.whole if self.whole else 1.0

    def _all(self) -> Tensor:
        return torch.ones(self.size, dtype=torch.bool)


End = Side | tuple[int, ...]
"""Something to count live channels on: a side of a kernel, or a tuple of classes."""


class SideCounts:
    """Counts the live channels on many sides at once.

    Classes that are on the same sides, equally often, are counted together (as a "profile"). So a count takes one pass
    over the classes and one over the few profiles, however many layers there are.

    Args:
        size: number of classes.
        constants: for each end, the count that doesn't depend on classes.
        ends: for each end (a side, or anything else to count on), the class of every index along it; `ALWAYS` entries
            are not counted.

    Attributes:
        size: number of classes.
        ends: number of ends.
        profiles: for each profile, the (end, count) pairs of one of its classes.
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
        """Count on these ends. Pinned channels always count."""
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
        """Sum a value per channel over the ends that each class is on. This turns slopes into prices.

        Args:
            per_end: the value of one channel on each end, float64, shape (ends,).

        Returns:
            float64, shape (classes,).
        """
        sums = per_end.new_zeros(len(self.profiles)).index_add_(0, self._row, self._count * per_end[self._end])
        return self.of_profiles(sums)

    def of_profiles(self, values: Tensor) -> Tensor:
        """Each class's value, shape (classes,), from the values of the profiles."""
        return values[self._profile]
