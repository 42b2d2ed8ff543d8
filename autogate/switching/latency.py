"""How long each subnet's forward takes on this machine: measured once, and kept."""

from __future__ import annotations

import statistics

from torch import nn

from autogate.budget import machine, time_model
from autogate.switching.bank import Subnets

ROUNDS = 3
"""The subnets are timed in turn, so often, because the load of a machine changes."""


def latencies(model: nn.Module, subnets: Subnets) -> dict[int, float]:
    """Seconds of a forward over one sample in eval mode, by the number of the subnet, widths between them included.

    Those that were timed on this machine before are not timed again.

    Raises:
        AutogateError: a forward is running.
    """
    here = machine(model)
    new = [number for number, subnet in enumerate(subnets.subnets) if subnet.timed is None or subnet.timed[0] != here]
    calls = subnets.origin.calls_for(model) if new else ()
    taken: dict[int, list[float]] = {number: [] for number in new}
    for _ in range(ROUNDS):
        for number in new:
            with subnets.switched(model, number):
                taken[number].append(time_model(model, [], calls[0])[0])
    for number, seconds in taken.items():
        subnets.subnets[number].timed = (here, statistics.median(seconds))
    return known_latencies(model, subnets)


def known_latencies(model: nn.Module, subnets: Subnets) -> dict[int, float]:
    """The same, of those that were timed on this machine before."""
    here = machine(model)
    timed = {number: subnet.timed for number, subnet in enumerate(subnets.subnets)}
    return {number: one[1] for number, one in timed.items() if one is not None and one[0] == here}
