"""Blocks that are fused into one convolution: before gates are learned, and once the channels are out."""

import torch
from torch import nn

import autogate
from tests.rewriters.helpers import Net, conv, image


class FusedHead(Net):
    """Its head was a norm and a linear layer `l` once, and is one linear layer now."""

    def get_classifier(self) -> nn.Module:
        return self.head.l


def test_a_model_that_no_longer_finds_its_classifier_is_finalized():
    torch.manual_seed(0)
    model = FusedHead(lambda net, x: net.head(net.stem(x).mean((2, 3))), stem=conv(3, 8), head=nn.Linear(8, 2))
    model = autogate.prepare(model, image(), flops=1.0)
    with torch.no_grad():
        autogate.gates(model).alpha[:4] = 0
    assert autogate.finalize(model, warn=False).head.in_features == 4
