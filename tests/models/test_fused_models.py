"""Blocks fused into one convolution, before gates are learned and after channels are removed."""

import pytest
import timm
import torch
from timm.utils import reparameterize_model
from torch import nn

import autogate
import rewriters
from benchmarks.parts import LEAST_SPREAD, kill, settle_norms, spread
from tests.rewriters.helpers import Net, conv, image
from tests.slow import slow_but

SMALL = {
    "repvgg_a0": {}, "mobileone_s0": {}, "fastvit_t8": {"layers": (1, 1, 1, 1)}, "repvit_m0_9": {}, "shvit_s1": {},
    "lcnetv2_small": {},
}  # fmt: skip


def build(name: str) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    model, example = timm.create_model(name, num_classes=10, **SMALL[name]).double(), torch.randn(2, 3, 64, 64).double()
    settle_norms(model, ((example,), {}))
    return model, example


def outputs(model: nn.Module, example: torch.Tensor) -> list[torch.Tensor]:
    found = rewriters.run_eval(model, (example,))
    assert spread(found) > LEAST_SPREAD
    return found


def slimmed(model: nn.Module, example: torch.Tensor) -> tuple[nn.Module, list[torch.Tensor]]:
    """The model without a quarter of its classes, and what it gave with their gates closed.

    A fused model has no norms that would make up for what is lost: without half of the classes, nothing is left of
    what an image tells.
    """
    model = autogate.prepare(model, example, flops=1.0)
    kill(model, 0.25)
    settle_norms(model, ((example,), {}))
    gated = outputs(model, example)
    return autogate.finalize(model, warn=False), gated


def fused(model: nn.Module) -> nn.Module:
    """RepViT's fused layers are of the default type, whatever they are made from."""
    return reparameterize_model(model).double()


@pytest.mark.parametrize("name", slow_but(["repvgg_a0"], SMALL))
def test_a_fused_model_is_slimmed_exactly(name):
    model, example = build(name)
    slim, gated = slimmed(fused(model), example)
    assert rewriters.relative_error(outputs(slim, example), gated) <= 1e-10


@pytest.mark.parametrize("name", slow_but(["repvgg_a0"], SMALL))
def test_a_slim_model_is_fused_exactly(name):
    slim, gated = slimmed(*build(name))
    assert rewriters.relative_error(outputs(fused(slim), build(name)[1]), gated) <= 1e-5


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
