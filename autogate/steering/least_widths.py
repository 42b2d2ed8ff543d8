"""The least width of each layer: what learning leaves of it, whatever the targets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from autogate.budget import ROUNDING, Targets
from autogate.steering.critical_groups import critical_groups
from autogate.steering.groups import Group, Narrowing
from autogate.steering.schedule import Schedule
from rewriters import AutogateError, ChannelMap

_WIDTH_RESOLUTION = 0.005
"""How closely the uniform width of all layers is determined."""


def part_alike(narrowing: Narrowing, targets: Targets) -> float | None:
    """The part that each group keeps if all are narrowed uniformly until the targets are met.

    None if they can't be met with every group alive.
    """
    if targets.distance(narrowing.live(0.0)) > 0:
        return None
    if targets.distance(narrowing.live(1.0)) <= 0:
        return 1.0
    alike, too_wide = 0.0, 1.0
    while too_wide - alike > _WIDTH_RESOLUTION:
        middle = (alike + too_wide) / 2
        alike, too_wide = (middle, too_wide) if targets.distance(narrowing.live(middle)) <= 0 else (alike, middle)
    return alike


def keep_counts(groups: Sequence[Group], targets: Targets, schedule: Schedule) -> Tensor:
    """How many classes of each group learning leaves alive, int64, shape (groups,).

    The course's `keep` times what is left when all groups are narrowed uniformly until the targets are met; at least
    one class, in whole bundles. If the targets can't be met with every group alive: one bundle of the groups that are
    needed, none of the others; the same if lambda is fixed, for then there are no targets. Limits are kept in any case.
    """
    narrowing = Narrowing(groups)
    alike = None if schedule.course.lam is not None else part_alike(narrowing, targets)
    return _fewest(groups) if alike is None else narrowing.counts(schedule.course.keep * alike)


def with_needed(
    groups: Sequence[Group], channel_map: ChannelMap, targets: Targets, always: bool = False
) -> list[Group]:  # fmt: skip
    """The groups, with those marked that are needed if the targets can't be met with every group alive.

    Branches may then die as a whole. If it is only `round_to` or the caller's limits that put the targets out of reach,
    they don't.

    Args:
        groups: the groups of the map.
        channel_map: a model's classes of channels.
        targets: what is to be left.
        always: mark the groups in any case.

    Raises:
        AutogateError: the targets are out of reach because of `round_to` or limits, or with the needed groups alive.
    """
    live = Narrowing(groups).live(0.0)
    if targets.distance(live) <= 0 and not always:
        return list(groups)
    _check_bundles(groups, targets)
    marked = _marked(groups, channel_map)
    live = Narrowing(marked).of_counts(_fewest(marked))
    for name in _missed(live, targets):
        limited = [group for group in marked if group.least]
        free = [replace(group, least=0) for group in marked]
        if limited and not _missed(Narrowing(free).of_counts(_fewest(free)), targets):
            raise _out_of_reach(
                name, live, targets, "with the least widths that `limits` asks for",
                "Ask for a larger share, or for lower limits.",
            )  # fmt: skip
        pace = max(group.pace for group in groups)
        raise _out_of_reach(
            name, live, targets,
            f"with the fewest channels that connect inputs to outputs (removed {pace} at a time)",
            "Ask for a larger share, or for a smaller `round_to`.",
        )  # fmt: skip
    return marked


def fewest_live(groups: Sequence[Group], channel_map: ChannelMap) -> Tensor:
    """The fewest classes that connect inputs to outputs, bool, shape (classes,): no budget can ask for less."""
    return Narrowing(groups).of_counts(_fewest(_marked(groups, channel_map)))


def _marked(groups: Sequence[Group], channel_map: ChannelMap) -> list[Group]:
    needed = critical_groups(channel_map, [group.classes for group in groups])
    return [replace(group, needed=number in needed) for number, group in enumerate(groups)]


def _fewest(groups: Sequence[Group]) -> Tensor:
    """The fewest classes of each group if branches may die as a whole, int64, shape (groups,)."""
    return torch.tensor([group.narrowest if group.needed else group.least for group in groups], dtype=torch.int64)


def _check_bundles(groups: Sequence[Group], targets: Targets) -> None:
    """Raise if the targets could be met with every group alive, but not in whole bundles."""
    pace = max(group.pace for group in groups)
    single = [replace(group, pace=1) for group in groups]
    live = Narrowing(groups).live(0.0)
    if pace > 1 and targets.distance(Narrowing(single).live(0.0)) <= 0:
        raise _out_of_reach(
            _missed(live, targets)[0], live, targets,
            f"when every layer has its least width: {pace} channels at a time, or all if a layer has fewer",
            "Ask for a larger share, or for a smaller `round_to`.",
        )  # fmt: skip


def _missed(live: Tensor, targets: Targets) -> list[str]:
    """The resources whose targets these live classes miss."""
    shares, wanted = targets.shares(live), targets.wanted()
    return [name for name, share in shares.items() if share > wanted[name] + ROUNDING]


def _out_of_reach(name: str, live: Tensor, targets: Targets, how: str, remedy: str) -> AutogateError:
    shares, wanted = targets.shares(live), targets.wanted()
    return AutogateError(
        f"{wanted[name]:.3f} of the {name} can't be reached: {shares[name]:.3f} are left {how}.", remedy=remedy
    )
