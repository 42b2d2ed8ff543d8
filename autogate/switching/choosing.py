"""Which subnet is meant: by number, by name, or by what it may cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from autogate.naming import did_you_mean
from autogate.switching.bank import Subnets
from autogate.switching.latency import latencies
from autogate.switching.widths import add_between
from rewriters import AutogateError

Which = int | str | float
"""A subnet: its number (0 is the smallest), its name, or the share of the FLOPs that it may have (a float)."""

TOLERANCE = 0.005
"""A subnet fits a share if it has at most this much more: budgets are met to within half a point."""


def number_of(
    model: nn.Module, subnets: Subnets, which: Which | None, limits: Mapping[str, float | None], between: bool = False
) -> int:
    """The number of the subnet that is meant.

    Args:
        model: has the subnets.
        subnets: the model's.
        which: its number, name, or share of the FLOPs.
        limits: the share that it may have of each resource, by its name; None: any.
        between: whether a width between two subnets will do; it is made if it isn't there yet.

    Raises:
        AutogateError: none is called so or fits, or too much or nothing is asked.
    """
    asked = {name: limit for name, limit in limits.items() if limit is not None}
    if isinstance(which, float):
        asked = {"FLOPs": which, **asked}
    elif which is not None and (asked or between):
        raise AutogateError(f"both {which!r} and a share are given.", where="subnets", remedy="Pass one of them.")
    if isinstance(which, str):
        return _called(which, [subnet.structure.name for subnet in subnets.subnets])
    if isinstance(which, int):
        count = subnets.full + 1
        if isinstance(which, bool) or not -count <= which < count:
            raise AutogateError(f"there is no subnet {which}.", where="subnets", remedy=f"There are {count}.")
        return range(count)[which]
    if not asked:
        raise AutogateError("no subnet is named.", where="subnets", remedy="Pass a name, a number or flops=0.3.")
    shares = [dict(subnet.structure.shares) for subnet in subnets.subnets[: subnets.full + 1]]
    if "latency" in asked:
        if between:
            raise AutogateError(
                "the latency of a width between subnets is known only once it was made.",
                where="subnets",
                remedy="Pass a share of the FLOPs or parameters with between=True.",
            )
        timed = latencies(model, subnets)
        shares = [{**one, "latency": timed[number] / timed[subnets.full]} for number, one in enumerate(shares)]
    found = _largest(shares, asked, subnets.subnets[0].structure.name)
    if between and found < subnets.full and not _near(shares[found], asked):
        return add_between(model, subnets, asked)
    return found


def _called(name: str, names: list[str]) -> int:
    if name not in names:
        raise AutogateError(f"no subnet is called {name!r}.", where="subnets", remedy=did_you_mean(name, names))
    return names.index(name)


def _largest(shares: Sequence[Mapping[str, float]], limits: Mapping[str, float], smallest: str) -> int:
    fitting = [
        number for number, one in enumerate(shares)
        if all(limit >= 1 or one[name] <= limit + TOLERANCE for name, limit in limits.items())
    ]  # fmt: skip
    if not fitting:
        least = ", ".join(f"{share:.1%} of the {name}" for name, share in shares[0].items())
        raise AutogateError(
            f"no subnet fits {' and '.join(f'{limit:.1%} of the {name}' for name, limit in limits.items())}.",
            where="subnets",
            remedy=f"The smallest, {smallest!r}, has {least}.",
        )
    return fitting[-1]


def _near(shares: Mapping[str, float], limits: Mapping[str, float]) -> bool:
    """Whether a subnet that fits uses up one of the shares."""
    return any(shares[name] >= limit - TOLERANCE for name, limit in limits.items())
