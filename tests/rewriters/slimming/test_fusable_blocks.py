"""The fields in which a block keeps its widths follow when channels are removed."""

import pytest
import torch
from torch import nn

from tests.rewriters.exactness import slim
from tests.rewriters.helpers import Net, conv, image


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
