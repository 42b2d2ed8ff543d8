"""What kernels with gates are called with is seen wherever the call is written."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import autogate
from autogate.criteria.observing import Observer
from rewriters.recording import without_fast_paths
from tests.rewriters.helpers import Net, conv


def seen(model, *inputs):
    """What the observer tells of a prepared model's run: by side, the indices and the mean of each column."""
    found = {}
    prepared = autogate.prepare(model.eval(), inputs)
    channel_map = autogate.gates(prepared).channel_map

    def tell(side, index, rows):
        found.setdefault(str(side), []).append((index.tolist(), rows.double().mean(0)))

    with torch.no_grad(), without_fast_paths(), Observer(prepared, channel_map, tell):
        prepared(*inputs)
    return found


IMAGE = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "reader",
    [
        conv(8, 4),
        conv(8, 4, 3).to(memory_format=torch.channels_last),
        nn.Conv2d(8, 4, 1, stride=2),
        nn.ConvTranspose2d(8, 4, 3),
    ],
)
def test_a_convolution_reads_the_channels_of_an_image(reader):
    model = Net(lambda m, x: m.b(m.a(x).relu()), a=conv(3, 8), b=reader)
    ((index, means),) = seen(model, IMAGE)[f"b.weight[{0 if isinstance(reader, nn.ConvTranspose2d) else 1}]"]
    assert index == list(range(8))
    assert torch.allclose(means, model.a(IMAGE).relu().double().mean((0, 2, 3)), atol=1e-6)


def test_a_grouped_convolution_reads_the_same_place_of_every_group():
    model = Net(lambda m, x: m.b(m.a(x).relu()), a=conv(3, 8), b=conv(8, 4, groups=2))
    ((index, means),) = seen(model, IMAGE)["b.weight[1]"]
    assert index == list(range(4))
    assert torch.allclose(means, model.a(IMAGE).relu().double().mean((0, 2, 3)).view(2, 4).mean(0), atol=1e-6)


@pytest.mark.parametrize(
    "product",
    [
        lambda m, x: m.b(x),
        lambda m, x: F.linear(x, m.b.weight),
        lambda m, x: x @ m.b.weight.T,
        lambda m, x: torch.einsum("bni,oi->bno", x, m.b.weight),
        lambda m, x: (m.b.weight @ x.mT).mT,
    ],
    ids=["layer", "functional", "matmul", "einsum", "from the left"],
)
def test_a_matrix_product_reads_features(product):
    model = Net(lambda m, x: product(m, m.a(x).relu()), a=nn.Linear(5, 8), b=nn.Linear(8, 4))
    x = torch.randn(2, 3, 5)
    ((index, means),) = seen(model, x)["b.weight[1]"]
    assert index == list(range(8))
    assert torch.allclose(means, model.a(x).relu().double().mean((0, 1)), atol=1e-6)


def test_a_part_of_a_kernel_reads_its_own_channels():
    model = Net(
        lambda m, x: F.linear(m.a(x), m.b.weight[:, :8]) + F.linear(m.c(x), m.b.weight[:, 8:]),
        a=nn.Linear(5, 8), c=nn.Linear(5, 4), b=nn.Linear(12, 4),
    )  # fmt: skip
    x = torch.randn(3, 5)
    first, second = seen(model, x)["b.weight[1]"]
    assert (first[0], second[0]) == (list(range(8)), list(range(8, 12)))
    assert torch.allclose(second[1], model.c(x).double().mean(0), atol=1e-6)


def test_a_shared_layer_is_seen_at_each_call():
    model = Net(lambda m, x: m.b(m.a(x)) + m.b(m.a(x).relu()), a=nn.Linear(5, 8), b=nn.Linear(8, 4))
    assert len(seen(model, torch.randn(3, 5))["b.weight[1]"]) == 2


def test_attention_reads_its_heads():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.attend = nn.Linear(5, 16), nn.MultiheadAttention(16, 4, batch_first=True)
            self.out = nn.Linear(16, 3)

        def forward(self, x):
            x = self.embed(x)
            return self.out(self.attend(x, x, x, need_weights=False)[0])

    found = seen(Attention(), torch.randn(2, 6, 5))
    assert {"attend.in_proj_weight[1]", "attend.out_proj.weight[1]", "out.weight[1]"} <= set(found)
