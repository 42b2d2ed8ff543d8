"""The progress of a run, as plain numbers."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """The progress of a run.

    Attributes:
        shares: the share that is left of each resource in the budget, by its name ("FLOPs", "parameters",
            "activations", "latency").
        targets: the share of it that is to be left.
        step: optimizer steps taken.
        steps: optimizer steps of the run.
        balance: lambda in the latest step (equation 7), for prices relative to their mean.
        method_state: the method's own numbers, by name: GDP has `epsilon`, the gates' smoothing constant.
        classes: number of gates.
        dead: number of dead classes.
        settled: no more classes die: the targets are met, or the steps are over.
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
