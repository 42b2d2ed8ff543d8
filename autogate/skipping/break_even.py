"""How many channels of a layer may be on for gathering them to be worth it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class BreakEven:
    """Up to which share of a layer's work it is faster to gather channels than to compute all of them.

    Attributes:
        work: channels are gathered if at most this share of the layer's multiply-adds is left then.
        columns: the kernel's columns are gathered too if at most this share of the input channels isn't zero.
    """

    work: float
    columns: float


ALL = BreakEven(1.0, 1.0)
"""Whatever is off is skipped."""
