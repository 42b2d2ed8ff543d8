"""Limits: bounds on the share of channels that a layer, a stage or a pattern of names keeps."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from autogate.budget import Resource, Target, Targets
from autogate.naming import tensors_named
from autogate.steering.groups import Group, places
from rewriters import ALWAYS, AutogateError, ChannelMap, Side

Bounds = float | tuple[float, float]
"""The least share that stays, or the least and the most."""

_ROUNDING = 1e-9


@dataclass(frozen=True)
class Limit:
    """Bounds on the share of channels that the named layers keep.

    Attributes:
        name: a module's path, a parameter's name, or a glob of these.
        least, most: the bounds, in [0, 1].
        tensors: the parameters and buffers that the name refers to.
    """

    name: str
    least: float
    most: float
    tensors: tuple[str, ...]

    def __str__(self) -> str:
        most = f"at most {self.most:g}" if self.most < 1 else ""
        return " and ".join(filter(None, [f"at least {self.least:g}" if self.least or not most else "", most]))


def read_limits(model: nn.Module, limits: Mapping[str, Bounds]) -> tuple[Limit, ...]:
    """The caller's limits, checked.

    Raises:
        AutogateError: a bound is out of its range, or a name refers to nothing.
    """
    found = []
    for name, bounds in limits.items():
        pair = bounds if isinstance(bounds, (tuple, list)) else (bounds, 1.0)
        holds = len(pair) == 2 and all(isinstance(bound, (int, float)) for bound in pair)
        if not (holds and 0 <= pair[0] <= pair[1] <= 1 and pair[1] > 0):
            raise AutogateError(
                f"limits has {bounds!r} for {name!r}.",
                where="prepare",
                remedy="Give the least share of its channels that stays, in [0, 1], or a pair: the least and the most.",
            )
        found.append(Limit(name, float(pair[0]), float(pair[1]), tuple(tensors_named(model, name, "limits"))))
    return tuple(found)


class _Bound(NamedTuple):
    """So many classes of a group, because of a limit."""

    number: int
    limit: Limit
    side: Side


def limited(groups: Sequence[Group], channel_map: ChannelMap, limits: Sequence[Limit]) -> list[Group]:
    """The groups with the bounds that these limits put on them.

    A limit bounds the channels that the named layers make; of a layer whose outputs all stay, as a classifier's do,
    those that it reads. A side's pinned channels count. If several groups lie on a side, each is bounded alone.

    Raises:
        AutogateError: a limit contradicts another one, a pin, or the multiples that widths end with.
    """
    if not limits:
        return list(groups)
    group_of = torch.full((channel_map.size + 1,), -1)  # the last entry stands for ALWAYS
    for number, group in enumerate(groups):
        group_of[list(group.classes)] = number
    least: dict[int, _Bound] = {}
    most: dict[int, _Bound] = {}
    for limit in limits:
        for side in _bounded_sides(channel_map, limit):
            lower, upper = _of_free_channels(channel_map, side, limit)
            for number in group_of[channel_map.classes[side].cpu()].unique().tolist():
                if number < 0:
                    continue
                pace, size = groups[number].pace, len(groups[number].classes)
                fewest = min(size, pace * math.ceil(lower * size / pace - _ROUNDING))
                widest = size if upper >= 1 else pace * math.floor(upper * size / pace + _ROUNDING)
                if number not in least or fewest > least[number].number:
                    least[number] = _Bound(fewest, limit, side)
                if number not in most or widest < most[number].number:
                    most[number] = _Bound(widest, limit, side)
    for number in least:
        _check(groups[number], least[number], most[number])
    return [
        replace(group, least=least[number].number, most=most[number].number if most[number].limit.most < 1 else None)
        if number in least
        else group
        for number, group in enumerate(groups)
    ]


def exceeded(groups: Sequence[Group], channel_map: ChannelMap, live: Tensor) -> str:
    """Which layers have more channels than their limits let stay, in words; empty if none has."""
    found = []
    for group in groups:
        left = int(live[list(group.classes)].sum())
        if left > group.widest:
            side, _ = channel_map.where(group.classes[0])[0]
            name = side.tensor.removesuffix(".weight")
            found.append(f"{name} has {left} channels that could go, and its limit lets {group.widest} stay")
    return " and ".join(found)


def _bounded_sides(channel_map: ChannelMap, limit: Limit) -> Iterable[Side]:
    """The sides with removable channels that a limit bounds.

    Raises:
        AutogateError: a named layer keeps all of its channels, against the limit.
    """
    kernels = [kernel for kernel in channel_map.kernels if kernel.weight in limit.tensors]
    if not kernels:  # a norm, say
        return [side for side in channel_map.classes if side.tensor in limit.tensors]
    sides = []
    for kernel in kernels:
        free = [side for side in (kernel.output_side, kernel.input_side) if _is_free(channel_map, side)]
        if not free and limit.most < 1:
            raise AutogateError(
                f"limits: at most {limit.most:g} of the channels of {kernel.module} are to stay, but all of them are "
                f"pinned. {channel_map.why_pinned()}",
                where=f"limits[{limit.name!r}]",
                remedy="Leave out the upper bound.",
            )
        sides += free[:1]
    return dict.fromkeys(sides)


def _is_free(channel_map: ChannelMap, side: Side) -> bool:
    """Whether a channel of a side can be removed."""
    return side in channel_map.classes and bool((channel_map.classes[side] != ALWAYS).any())


def _of_free_channels(channel_map: ChannelMap, side: Side, limit: Limit) -> tuple[float, float]:
    """A limit's bounds as shares of those channels of a side that can be removed."""
    classes = channel_map.classes[side]
    count, pinned = len(classes), int((classes == ALWAYS).sum())
    if limit.most * count < pinned - _ROUNDING:
        raise AutogateError(
            f"limits: at most {limit.most:g} of the {count} channels on {side} are to stay, but {pinned} of them are "
            f"pinned. {channel_map.why_pinned()}",
            where=f"limits[{limit.name!r}]",
            remedy="Ask for a larger share.",
        )
    free = count - pinned
    return max(0.0, (limit.least * count - pinned) / free), (limit.most * count - pinned) / free


def _check(group: Group, least: _Bound, most: _Bound) -> None:
    """Raise if the bounds of a group contradict one another, or the bundles that its classes die in."""
    size = len(group.classes)
    where = f"{most.side}, {size} channels"
    if least.number > most.number and least.limit is not most.limit:
        raise AutogateError(
            f"limits: {least.limit.name!r} asks for {least.limit}, {most.limit.name!r} for {most.limit}, of the same "
            "channels.",
            where=where,
            remedy="Layers whose channels are coupled share one width; autogate.summary shows it.",
        )
    if most.number < max(least.number, min(group.pace, size)):
        raise AutogateError(
            f"limits: no width that is left in portions of {group.pace} meets {most.limit.name!r} ({most.limit}).",
            where=where,
            remedy="Give a wider range, or a smaller `round_to`.",
        )


class Excess(Resource):
    """The classes that groups have above their upper limits."""

    name = "channels above limits"

    def __init__(self, groups: Sequence[Group]):
        super().__init__(sum(len(group.classes) for group in groups))
        self._group, _ = places(groups)
        self._most = torch.tensor([group.widest for group in groups], dtype=torch.int64)

    def _above(self, live: Tensor) -> Tensor:
        """How many classes each group has above its limit, int64, shape (groups,)."""
        return (torch.bincount(self._group[live], minlength=len(self._most)) - self._most).clamp(min=0)

    def value(self, live: Tensor) -> Tensor:
        return self._above(live).sum().to(torch.float64)

    def price(self, live: Tensor) -> Tensor:
        return (self._above(live) > 0).to(torch.float64)[self._group]


def excess_of(groups: Sequence[Group]) -> Targets | None:
    """What the upper limits of groups ask for, as targets: nothing above them. None if there are no upper limits."""
    if all(group.most is None for group in groups):
        return None
    return Targets([Target(Excess(groups), 0.0)])
