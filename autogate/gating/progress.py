"""Where gates stand on their way, as plain numbers."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """Where a bank stands.

    Attributes:
        shares: the part that is left of each resource in the budget, by its name ("FLOPs", "parameters",
            "activations", "latency").
        targets: the part of it that shall be left.
        step: optimizer steps taken.
        steps: optimizer steps that the run takes.
        balance: lambda of equation 7 in the latest step, with prices relative to their mean.
        method_state: the method's own numbers, by name: GDP has `epsilon`, the gates' smoothing constant.
        classes: number of gates.
        dead: number of closed ones.
        settled: the targets have been met, the dead are final.
    """

    shares: dict[str, float]
    targets: dict[str, float]
    step: int
    steps: int
    balance: float
    method_state: dict[str, float]
    classes: int
    dead: int
    settled: bool
