"""Settings that a run refuses."""

from __future__ import annotations

from typing import Any

import pytest

import autogate
from autogate.training import Budget, Distillation, Images, Learning, Network, Recipe


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: Learning(opt="adamq"), "Known names are adam"),
        (lambda: Learning(sched="cosin"), "cosine"),
        (lambda: Learning(epochs=2, warmup_epochs=2), "warm-up"),
        (lambda: Budget(flops=1.5), r"in \(0, 1\]"),
        (lambda: Distillation(weight=0.0), "weight"),
        (lambda: Recipe(Network("x"), Images("y", batch_size=3, mixup=1.0)), "even batch"),
    ],
)
def test_what_can_not_be_asked_for(make: Any, told: str):
    with pytest.raises(autogate.AutogateError, match=told):
        make()
