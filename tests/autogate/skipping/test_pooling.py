"""Max pooling of the channels that aren't zero."""

import pytest
import torch
from torch import nn

from autogate.skipping.break_even import ALL, BreakEven
from autogate.skipping.pooling import PoolingForward


@pytest.mark.parametrize("pool", [nn.MaxPool2d(3, 2, 1), nn.MaxPool2d(2, ceil_mode=True), nn.MaxPool2d(3, 1, 1, 2)])
@pytest.mark.parametrize("zero", [[], [0, 2], [0, 1, 2, 3, 4]])
def test_channels_that_are_zero_stay_zero(pool, zero, monkeypatch):
    x = torch.randn(3, 5, 9, 9)
    x[:, zero] = 0
    x[0, 3] = 0  # not of all images
    x[:, 1] *= 1e-30  # small isn't zero
    wanted, forward = pool(x), PoolingForward(pool)
    forward.break_even = ALL
    seen = []
    monkeypatch.setattr(
        nn.MaxPool2d, "forward", lambda self, x, own=nn.MaxPool2d.forward: seen.append(x) or own(self, x)
    )
    with torch.no_grad():
        assert torch.equal(forward(x), wanted)
    assert seen[0].shape[1] == max(1, 5 - len(zero))
    forward.break_even = BreakEven(0.5, 0.0)
    with torch.no_grad():
        forward(x)
    assert seen[1].shape[1] == (1 if len(zero) == 5 else 5)
    forward(x)
    assert seen[2].shape[1] == 5  # with gradients
