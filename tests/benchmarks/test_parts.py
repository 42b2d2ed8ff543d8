"""Random networks are calmed before their outputs are compared."""

import pytest
import torch
from torch import nn

from benchmarks import parts


def test_a_chaotic_network_is_calmed_and_goes_on_telling_its_inputs_apart():
    torch.manual_seed(0)
    layers = [(nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), nn.Hardtanh()) for _ in range(60)]
    model = nn.Sequential(nn.Conv2d(3, 16, 3), *(layer for block in layers for layer in block), nn.Conv2d(16, 2, 3))
    inputs = ((torch.randn(2, 3, 12, 12),), {})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts, "MOST_GROWTH", float("inf"))
        parts.settle_norms(model, inputs)
    assert parts.growth(model, inputs) > parts.MOST_GROWTH
    parts.settle_norms(model, inputs)
    assert parts.growth(model, inputs) <= parts.MOST_GROWTH
    assert parts.spread(model.eval()(*inputs[0]).detach().unsqueeze(0)) > parts.LEAST_SPREAD
