"""Parameters that no optimizer could write to."""

import copy

import pytest
import torch
from torch import nn

import autogate


def net() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 3))


IMAGES = torch.zeros(2, 3, 8, 8)


def test_a_model_made_in_inference_mode_is_refused_and_its_copy_is_not():
    with torch.inference_mode():
        model = net()
    with pytest.raises(autogate.AutogateError, match=r"^0\.weight: it was made inside of torch\.inference_mode"):
        autogate.prepare(model, IMAGES)
    autogate.prepare(copy.deepcopy(model), IMAGES)


def test_an_expanded_kernel_is_refused():
    model = net()
    model[2].weight = nn.Parameter(torch.randn(6, 8, 1, 1).expand(6, 8, 3, 3))
    with pytest.raises(autogate.AutogateError, match=r"^2\.weight: its elements share memory"):
        autogate.prepare(model, IMAGES)
    model[2].weight = nn.Parameter(model[2].weight.detach().clone())
    autogate.prepare(model, IMAGES)
