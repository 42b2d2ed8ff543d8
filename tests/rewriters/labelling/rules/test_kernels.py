"""Convolutions and matrix products sum over channels and begin new ones."""

import operator

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from rewriters.analysis import analyse
from rewriters.labelling.channel_map import ALWAYS, Side
from tests.rewriters.exactness import assert_exact, slim
from tests.rewriters.helpers import Net, classes, conv, image, is_pinned, mapped, reasons


def test_convolution_begins_new_channels():
    found = mapped(lambda m, x: m.b(m.a(x)), a=conv(3, 4), b=conv(4, 2))
    assert classes(found, "a.bias", 0) == classes(found, "a.weight", 0) == classes(found, "b.weight", 1) == [0, 1, 2, 3]
    assert found.gated == (Side("b.weight", 1),)
    assert is_pinned(found, "a.weight", 1)  # the image's own channels


@pytest.mark.parametrize(
    ("into", "out", "expected"), [(4, 4, [0, 1, 2, 3]), (4, 8, [0, 0, 1, 1, 2, 2, 3, 3])], ids=["plain", "multiplier"]
)
def test_depthwise_passes_labels(into, out, expected):
    found = mapped(lambda m, x: m.c(m.b(m.a(x))), a=conv(3, into), b=conv(into, out, 3, groups=into), c=conv(out, 2))
    assert classes(found, "b.weight", 0) == classes(found, "c.weight", 1) == expected
    assert found.gated == (Side("c.weight", 1),)


def test_many_groups_die_whole():
    found = mapped(lambda m, x: m.c(m.b(m.a(x))), a=conv(3, 8), b=conv(8, 8, groups=4), c=conv(8, 2))
    assert classes(found, "a.weight", 0) == classes(found, "b.weight", 0) == [0, 0, 1, 1, 2, 2, 3, 3]


def test_few_groups_lose_the_same_places():
    found = mapped(lambda m, x: m.c(m.b(m.a(x))), a=conv(3, 8), b=conv(8, 8, groups=2), c=conv(8, 2))
    assert classes(found, "a.weight", 0) == [0, 1, 2, 3, 0, 1, 2, 3]
    assert classes(found, "b.weight", 0) == [4, 5, 6, 7, 4, 5, 6, 7]
    assert classes(found, "b.weight", 1) == [0, 1, 2, 3]


def test_transposed_convolution():
    found = mapped(lambda m, x: m.c(m.b(m.a(x))), a=conv(3, 4), b=nn.ConvTranspose2d(4, 5, 2), c=conv(5, 2))
    assert classes(found, "b.weight", 0) == classes(found, "a.weight", 0)
    assert classes(found, "b.weight", 1) == classes(found, "c.weight", 1) == classes(found, "b.bias", 0)


@pytest.mark.parametrize("groups", [1, 2, 4, 8])
@pytest.mark.parametrize("layer", [nn.Conv2d, nn.ConvTranspose2d])
def test_groups_of_all_widths_are_exact(layer, groups):
    model = nn.Sequential(conv(3, 8), layer(8, 16, 3, groups=groups), nn.ReLU(), conv(16, 3)).double().eval()
    slimmed = assert_exact(model, (image().double(),))
    assert slimmed.analysis.channel_map.size > 0


def test_linear_layers_over_the_last_dimension():
    found = mapped(lambda m, x: m.b(F.relu(m.a(x))), torch.randn(2, 5, 6), a=nn.Linear(6, 4), b=nn.Linear(4, 3))
    assert classes(found, "a.weight", 0) == classes(found, "a.bias", 0) == classes(found, "b.weight", 1) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    "product",
    [
        lambda m, y: y @ m.w, lambda m, y: torch.matmul(y, m.w), lambda m, y: F.linear(y, m.w.t()),
        lambda m, y: torch.einsum("bnc,cd->bnd", y, m.w), lambda m, y: torch.tensordot(y, m.w, dims=1),
        lambda m, y: (m.w.T @ y.transpose(1, 2)).transpose(1, 2),
        lambda m, y: torch.addmm(m.bias, y.flatten(0, 1), m.w).view(2, 5, 3),
    ],
)  # fmt: skip
def test_products_with_a_parameter_are_kernels(product):
    found = mapped(
        lambda m, x: m.c(product(m, m.a(x))), torch.randn(2, 5, 6), a=nn.Linear(6, 4), c=nn.Linear(3, 2),
        w=nn.Parameter(torch.randn(4, 3)), bias=nn.Parameter(torch.randn(3)),
    )  # fmt: skip
    assert classes(found, "w", 0) == classes(found, "a.weight", 0)
    assert classes(found, "w", 1) == classes(found, "c.weight", 1)
    assert Side("w", 0) in found.gated


class Attention(nn.Module):
    def __init__(self, fused: bool):
        super().__init__()
        self.fused, self.qkv, self.proj = fused, nn.Linear(6, 36), nn.Linear(12, 6)

    def forward(self, x):
        b, n, _ = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, 3, 4).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v) if self.fused else (q @ k.mT * 0.5).softmax(-1) @ v
        return self.proj(y.transpose(1, 2).reshape(b, n, 12))


@pytest.mark.parametrize("fused", [False, True])
def test_attention_loses_whole_heads(fused):
    slimmed = assert_exact(Attention(fused).double(), (torch.randn(2, 5, 6, dtype=torch.float64),))
    assert classes(slimmed.analysis.channel_map, "proj.weight", 1) == [0] * 4 + [1] * 4 + [2] * 4


def test_a_kernel_mixed_in_the_forward_pins_what_it_sums_over():
    found = mapped(lambda m, x: F.conv2d(m.a(x), m.b.weight.softmax(1)), a=conv(3, 4), b=conv(4, 2))
    assert is_pinned(found, "a.weight", 0)
    assert any("derived kernel" in reason for reason in reasons(found, "a.weight", 0))


def test_a_kernel_shared_by_two_layers_couples_them():
    a, b = conv(3, 4), conv(4, 4)
    found = mapped(lambda m, x: m.c(m.b(m.b(m.a(x)))), a=a, b=b, c=conv(4, 2))
    assert classes(found, "a.weight", 0) == classes(found, "b.weight", 0) == classes(found, "b.weight", 1)


def test_one_parameter_in_two_modules():
    def build():
        first, second = conv(4, 4), conv(4, 4)
        second.weight = first.weight
        return nn.Sequential(conv(3, 4), first, nn.ReLU(), second, conv(4, 2)).double().eval()

    slimmed = assert_exact(build(), (image().double(),))
    assert slimmed.model[1].weight.shape == slimmed.model[3].weight.shape


def test_two_activations_multiplied_are_pinned_where_summed():
    def gram(m, x):
        y = m.a(x).flatten(2)
        return m.b((y.transpose(1, 2) @ y).unsqueeze(1))

    found = mapped(gram, a=conv(3, 4), b=conv(1, 2))
    assert is_pinned(found, "a.weight", 0)
    assert any("product of activations" in reason for reason in reasons(found, "a.weight", 0))


@pytest.mark.parametrize("groups", [1, 2, 3])
def test_functional_convolutions(groups):
    weight = nn.Parameter(torch.randn(2 * groups, 4, 3, 3))
    model = Net(
        lambda m, x: m.c(F.conv2d(input=m.a(x), weight=m.w, groups=groups)), a=conv(3, 4 * groups), w=weight,
        c=conv(2 * groups, 2),
    )  # fmt: skip
    slimmed = assert_exact(model.double().eval(), (image().double(),))
    assert slimmed.analysis.channel_map.size > 0


def test_pinned_classes_are_minus_one():
    assert ALWAYS == -1


@pytest.mark.parametrize("product", [torch.sparse.mm, torch.mm, operator.matmul], ids=["sparse.mm", "mm", "@"])
@pytest.mark.parametrize("stored", [False, True], ids=["argument", "attribute"])
def test_channels_pass_along_the_edges_of_a_graph(product, stored):
    """A graph convolution: each node sums over its neighbours (Kipf and Welling, equation 2)."""

    def forward(m, x, edges=None):
        return m.b(product(m.edges if edges is None else edges, m.a(x)).relu())

    net = Net(forward, a=nn.Linear(3, 8), b=nn.Linear(8, 2)).double()
    edges = (torch.rand(6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64) - 0.5).relu()
    net.__dict__["edges"] = edges.to_sparse()
    args = (torch.randn(6, 3).double(), *([] if stored else [net.edges]))
    channel_map = assert_exact(net, args).analysis.channel_map
    assert classes(channel_map, "a.weight", 0) == classes(channel_map, "b.weight", 1) == [*range(8)]


def test_no_gate_stands_in_a_buffer():
    found = mapped(
        lambda m, x: m.b(F.conv2d(m.a(x), m.fixed)), a=conv(3, 4), fixed=torch.randn(5, 4, 1, 1), b=conv(5, 2)
    )
    assert is_pinned(found, "a.weight", 0)
    assert "summed against a derived kernel" in reasons(found, "a.weight", 0)[0]
    assert {side.tensor for side in found.gated} == {"b.weight"}


def test_a_depthwise_blur_in_a_buffer_passes_channels():
    blur = torch.ones(4, 1, 3, 3)
    found = mapped(lambda m, x: m.b(F.conv2d(m.a(x), m.fixed, groups=4)), a=conv(3, 4), fixed=blur, b=conv(4, 2))
    assert classes(found, "a.weight", 0) == classes(found, "fixed", 0) == classes(found, "b.weight", 1) == [0, 1, 2, 3]


class Experts(nn.Module):
    """Rows sorted by expert, and each expert's own kernels, as transformers' mixtures have them."""

    def __init__(self):
        super().__init__()
        self.router = nn.Linear(16, 3)
        self.up, self.down = nn.Parameter(torch.randn(3, 32, 16) / 4), nn.Parameter(torch.randn(3, 16, 16) / 4)

    def forward(self, x):
        chosen, order = self.router(x).argmax(1).sort()
        ends = torch.histc(chosen.float(), 3, 0, 2).cumsum(0, dtype=torch.int32)
        gate, up = F.grouped_mm(x[order], self.up.transpose(1, 2), offs=ends).chunk(2, -1)
        y = F.grouped_mm(gate.sigmoid() * up, self.down.transpose(1, 2), offs=ends)
        return y[order.argsort()]


def mixture():
    torch.manual_seed(0)
    return Net(lambda m, x: m.b(m.experts(m.a(x))), a=nn.Linear(6, 16), experts=Experts(), b=nn.Linear(16, 4)).eval()


def test_experts_lose_the_same_channels_in_bundles():
    found = analyse(mixture(), (torch.randn(10, 6),)).channel_map
    bundles = [number for number in (0, 1) for _ in range(8)]
    assert classes(found, "a.weight", 0) == classes(found, "experts.router.weight", 1) == bundles
    assert classes(found, "experts.up", 2) == bundles
    inner = classes(found, "experts.down", 2)
    assert classes(found, "experts.up", 1) == [*inner, *inner] and len(set(inner)) == 2
    assert (
        classes(found, "experts.down", 1) == classes(found, "b.weight", 1)
        and len(set(found.classes[Side("b.weight", 1)].tolist())) == 16
    )
    assert is_pinned(found, "experts.up", 0) and is_pinned(found, "experts.router.weight", 0)
    up = next(kernel for kernel in found.kernels if kernel.weight == "experts.up")
    assert (up.input_side, up.output_side) == (Side("experts.up", 2), Side("experts.up", 1))
    assert up.macs == up.outputs == 1  # every row goes through one expert


@pytest.mark.parametrize("seed", range(3))
def test_experts_are_slimmed_exactly(seed):
    slimmed = slim(mixture(), (torch.randn(10, 6),), share=0.6, seed=seed)
    assert slimmed.error <= 1e-5
    assert slimmed.model.experts.up.shape[1] < 32 or slimmed.model.experts.up.shape[2] < 16
