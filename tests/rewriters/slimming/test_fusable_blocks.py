"""Blocks that are fused into one convolution: before gates are learned, and once the channels are out."""

import pytest
import timm
import torch
from timm.utils import reparameterize_model
from torch import nn

import autogate
import rewriters
from benchmarks.parts import LEAST_SPREAD, kill, settle_norms, spread
from tests.rewriters.exactness import slim
from tests.rewriters.helpers import Net, conv, image

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


@pytest.mark.parametrize("name", SMALL)
def test_a_fused_model_is_slimmed_exactly(name):
    model, example = build(name)
    slim, gated = slimmed(fused(model), example)
    assert rewriters.relative_error(outputs(slim, example), gated) <= 1e-10


@pytest.mark.parametrize("name", SMALL)
def test_a_slim_model_is_fused_exactly(name):
    slim, gated = slimmed(*build(name))
    assert rewriters.relative_error(outputs(fused(slim), build(name)[1]), gated) <= 1e-5


class Branches(nn.Module):
    """Two depthwise kernels and what follows them, with the fields that fusing the two would read."""

    def __init__(self, in_chs: int, out_chs: int):
        super().__init__()
        self.in_chs, self.out_chs, self.groups = in_chs, out_chs, in_chs
        self.wide, self.narrow = (conv(in_chs, in_chs, size, groups=in_chs) for size in (3, 1))
        self.squeeze, self.out = conv(in_chs, in_chs // 2), conv(in_chs // 2, out_chs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.squeeze(self.wide(x) + self.narrow(x)).relu())

    def reparameterize(self) -> None:
        """That it is there tells that the block can be fused; it isn't called."""


class NormAlone(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.dim, self.groups, self.norm = dim, dim, nn.BatchNorm2d(dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x)

    def fuse(self) -> None:
        """As `Branches.reparameterize`."""


@pytest.mark.parametrize("out_chs", [6, 8, 16])
def test_fields_that_fusing_reads_follow_and_come_back(out_chs):
    torch.manual_seed(0)
    model = Net(
        lambda net, x: net.head(net.alone(net.block(net.stem(x)))),
        stem=conv(3, 16), block=Branches(16, out_chs), alone=NormAlone(out_chs), head=conv(out_chs, 2),
    ).double()  # fmt: skip
    fields = lambda: (model.block.in_chs, model.block.groups, model.block.out_chs, model.alone.dim, model.alone.groups)  # noqa: E731
    before = fields()
    slimmed = slim(model, (image().double(),), share=0.4, seed=2)
    into, out = model.stem.out_channels, model.head.in_channels
    assert into < 16
    assert out < out_chs
    assert fields() == (into, into, out, out, out)
    slimmed.undo_log.undo()
    assert fields() == before


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
