"""Attention in its forms: what dies is whole heads, and what stands beside them doesn't keep them."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from rewriters.analysis import analyse
from rewriters.channel_map import ALWAYS
from tests.rewriters.exactness import assert_exact
from tests.rewriters.helpers import Net, classes, is_pinned, mapped

HEADS, WIDTH, TOKENS, EMBED = 3, 4, 5, 6
INNER = HEADS * WIDTH


def tokens() -> torch.Tensor:
    return torch.randn(2, TOKENS, EMBED, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def members(**more):
    """The layers of an attention, and copies of what one form has more, in float64."""
    layers = {"qkv": nn.Linear(EMBED, 3 * INNER), "proj": nn.Linear(INNER, 2), **copy.deepcopy(more)}
    net = Net(lambda m: m, **layers).double()
    return {**net._modules, **net._parameters, **net._buffers}


def split_heads(m, x):
    q, k, v = m.qkv(x).reshape(*x.shape[:2], 3, HEADS, -1).permute(2, 0, 3, 1, 4).unbind(0)
    return q, k, v


def attend(m, q, k, v, bias=0.0):
    mixed = ((q * WIDTH**-0.5) @ k.transpose(-2, -1) + bias).softmax(-1) @ v
    return m.proj(mixed.transpose(1, 2).flatten(2))


def fused(m, q, k, v):
    return m.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def rotate_pairs(x):
    return torch.stack([-x[..., 1::2], x[..., ::2]], -1).reshape(x.shape)


def rotate_halves(x):
    first, second = x.chunk(2, -1)
    return torch.cat([-second, first], -1)


def by_hand(x, weight):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * weight


FORMS = {
    "plain": (lambda m, x: attend(m, *split_heads(m, x)), {}),
    "fused": (lambda m, x: fused(m, *split_heads(m, x)), {}),
    "chunks": (
        lambda m, x: fused(m, *(y.unflatten(2, (HEADS, -1)).transpose(1, 2) for y in m.qkv(x).chunk(3, -1))), {}
    ),
    "a table of positions": (
        lambda m, x: fused(m, *((split_heads(m, x)[i] + (m.table if i == 0 else 0)) for i in range(3))),
        {"table": torch.randn(TOKENS, WIDTH)},
    ),
    "pairs that rotate": (
        lambda m, x: fused(
            m, *(y * m.cos + rotate_pairs(y) * m.sin if i < 2 else y for i, y in enumerate(split_heads(m, x)))
        ),
        {"cos": torch.randn(TOKENS, WIDTH), "sin": torch.randn(TOKENS, WIDTH)},
    ),
    "halves that rotate": (
        lambda m, x: attend(
            m, *(y * m.cos + rotate_halves(y) * m.sin if i < 2 else y for i, y in enumerate(split_heads(m, x)))
        ),
        {"cos": torch.randn(TOKENS, WIDTH), "sin": torch.randn(TOKENS, WIDTH)},
    ),
    "a norm of q and k": (
        lambda m, x: fused(m, *(F.layer_norm(y, y.shape[-1:], m.g, m.g) if i < 2 else y
                                for i, y in enumerate(split_heads(m, x)))),
        {"g": nn.Parameter(torch.rand(WIDTH) + 0.5)},
    ),
    "an RMS norm written by hand": (
        lambda m, x: fused(m, *(by_hand(y, m.g) if i < 2 else y for i, y in enumerate(split_heads(m, x)))),
        {"g": nn.Parameter(torch.rand(WIDTH) + 0.5)},
    ),
    "a bias for each head": (
        lambda m, x: attend(m, *split_heads(m, x), bias=m.table[m.index].permute(2, 0, 1)),
        {"table": nn.Parameter(torch.randn(9, HEADS)), "index": torch.arange(TOKENS * TOKENS).view(TOKENS, -1) % 9},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMS)
def test_whole_heads_die(name):
    forward, more = FORMS[name]
    found = mapped(forward, tokens(), **members(**more))
    heads = classes(found, "proj.weight", 1)
    assert heads == [h for h in range(heads[0], heads[0] + HEADS) for _ in range(WIDTH)]
    assert classes(found, "qkv.weight", 0) == 3 * heads
    assert ALWAYS not in heads
    assert_exact(Net(forward, **members(**more)), (tokens(),))


def test_what_is_there_for_each_place_in_a_head_stays():
    forward, more = FORMS["an RMS norm written by hand"]
    assert is_pinned(mapped(forward, tokens(), **members(**more)), "g", 0)


def test_a_parameter_for_each_place_lets_places_go_where_heads_needn_t():
    """Without a product over the places in a head, these may die alike in every head."""
    forward = lambda m, x: m.proj((m.qkv(x).unflatten(2, (HEADS, WIDTH)) * m.g).flatten(2))  # noqa: E731
    more = {"qkv": nn.Linear(EMBED, INNER), "proj": nn.Linear(INNER, 2), "g": nn.Parameter(torch.rand(WIDTH) + 0.5)}
    found = mapped(forward, tokens().float(), **more)
    places = classes(found, "g", 0)
    assert len(set(places)) == WIDTH
    assert classes(found, "proj.weight", 1) == HEADS * places
    assert_exact(Net(forward, **more).double(), (tokens(),))


GROUPS = 2


def grouped(m, x, spread):
    """Four heads in groups of two that share their keys and values."""
    q = m.q(x).unflatten(-1, (2 * GROUPS, -1)).transpose(1, 2)
    k, v = (layer(x).unflatten(-1, (GROUPS, -1)).transpose(1, 2) for layer in (m.k, m.v))
    return m.proj(spread(q, k, v).transpose(1, 2).flatten(2))


def repeated(x):
    return x[:, :, None].expand(-1, -1, 2, -1, -1).flatten(1, 2)


@pytest.mark.parametrize(
    "spread",
    [
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True),
        lambda q, k, v: F.scaled_dot_product_attention(q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)),
        lambda q, k, v: F.scaled_dot_product_attention(q, repeated(k), repeated(v)),
    ],
)
def test_heads_that_share_keys_and_values_die_with_them(spread):
    sizes = {"q": 2 * GROUPS * WIDTH, "k": GROUPS * WIDTH, "v": GROUPS * WIDTH}
    layers = {name: nn.Linear(EMBED, size) for name, size in sizes.items()}
    net = Net(lambda m, x: grouped(m, x, spread), **layers, proj=nn.Linear(2 * GROUPS * WIDTH, 2)).double()
    found = analyse(net, (tokens(),)).channel_map
    assert classes(found, "k.weight", 0) == classes(found, "v.weight", 0) == [g for g in range(2) for _ in range(WIDTH)]
    assert classes(found, "q.weight", 0) == [g for g in range(2) for _ in range(2 * WIDTH)]
    assert_exact(net, (tokens(),))


def test_a_width_read_off_the_input_is_none_of_the_inside_s():
    """Heads that stay (they meet a mask that nobody owns) beside an embedding that shrinks; both are as wide."""

    def forward(m, x):
        b, n, c = x.shape
        q, k, v = m.qkv(x).reshape(b, n, 3, HEADS, -1).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = ((q @ k.transpose(-2, -1) + m.mask).softmax(-1) @ v).transpose(1, 2)
        return m.proj(mixed.reshape(b, n, c))

    mask = torch.randint(2, (HEADS, TOKENS, TOKENS))
    inside = Net(forward, qkv=nn.Linear(INNER, 3 * INNER), proj=nn.Linear(INNER, 2), mask=mask)
    net = nn.Sequential(nn.Linear(EMBED, INNER), inside).double()
    assert ALWAYS not in classes(analyse(net, (tokens(),)).channel_map, "0.weight", 0)
    assert_exact(net, (tokens(),))
