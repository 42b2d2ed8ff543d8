"""Attention loses whole heads, and what is beside the heads doesn't keep them."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from rewriters.analysis.analyse import analyse
from rewriters.labelling.channel_map import ALWAYS
from tests.rewriters.exactness import assert_exact
from tests.rewriters.helpers import Net, classes, conv, image, is_pinned, mapped

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


def joined(m, heads):
    return m.proj(heads.transpose(1, 2).flatten(2))


def linear(m, q, k, v):
    """Katharopoulos et al., "Transformers are RNNs", section 3.2."""
    q, k = q.relu(), k.relu()
    return joined(m, q @ (k.transpose(-2, -1) @ v) / (q @ k.sum(-2).unsqueeze(-1) + 1e-6))


def linear_padded(m, q, k, v):
    """As `linear`; keys are summed by a column of ones beside the values."""
    both = q.relu() @ (k.relu().transpose(-2, -1) @ F.pad(v, (0, 1), value=1.0))
    return joined(m, both[..., :-1] / (both[..., -1:] + 1e-6))


def cross_covariance(m, q, k, v):
    """El-Nouby et al., "XCiT: Cross-Covariance Image Transformers", section 3.2."""
    q, k = (F.normalize(y, dim=-2) for y in (q, k))
    mixed = (q.transpose(-2, -1) @ k * m.temperature).softmax(-1) @ v.transpose(-2, -1)
    return m.proj(mixed.permute(0, 3, 1, 2).flatten(2))


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
    "linear": (lambda m, x: linear(m, *split_heads(m, x)), {}),
    "linear with a column of ones": (lambda m, x: linear_padded(m, *split_heads(m, x)), {}),
    "cross-covariance": (
        lambda m, x: cross_covariance(m, *split_heads(m, x)),
        {"temperature": nn.Parameter(torch.rand(HEADS, 1, 1) + 0.5)},
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
    assert found.heads == set(heads) and [set(group.classes) for group in found.groups() if group.heads] == [set(heads)]
    assert_exact(Net(forward, **members(**more)), (tokens(),))


def test_channels_that_are_multiplied_each_with_itself_are_no_heads():
    def forward(m, x):
        y = m.a(x)
        return m.b(y @ y.transpose(-2, -1))

    found = mapped(forward, image(), a=conv(3, 4), b=conv(4, 2))
    assert len(set(classes(found, "a.weight", 0))) == 4 and not found.heads


def test_what_is_there_for_each_place_in_a_head_stays():
    forward, more = FORMS["an RMS norm written by hand"]
    assert is_pinned(mapped(forward, tokens(), **members(**more)), "g", 0)


def test_a_parameter_for_each_place_lets_places_go_where_heads_needn_t():
    """Without a product over the places in a head, these may die alike in every head."""
    forward = lambda m, x: m.proj((m.qkv(x).unflatten(2, (HEADS, WIDTH)) * m.g).flatten(2))  # noqa: E731
    more = {"qkv": nn.Linear(EMBED, INNER), "proj": nn.Linear(INNER, 2), "g": nn.Parameter(torch.rand(WIDTH) + 0.5)}
    found = mapped(forward, tokens().float(), **more)
    places = classes(found, "g", 0)
    assert len(set(places)) == WIDTH and not found.heads
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


def one_for_all(m, x, spread):
    """Heads all of which read the same keys and values."""
    q = m.q(x).unflatten(-1, (HEADS, -1)).transpose(1, 2)
    return joined(m, spread(q, m.k(x)[:, None], m.v(x)[:, None]))


def mixed(q, k, v):
    return ((q * WIDTH**-0.5) @ k.transpose(-2, -1)).softmax(-1) @ v


def as_rows(m, x):
    """The heads' queries in one matrix."""
    q = m.q(x).unflatten(-1, (HEADS, -1)).transpose(1, 2).flatten(1, 2)
    return joined(m, mixed(q, m.k(x), m.v(x)).unflatten(1, (HEADS, -1)))


def by_einsum(m, x):
    scores = torch.einsum("bnhd,bmd->bhnm", m.q(x).unflatten(-1, (HEADS, -1)) * WIDTH**-0.5, m.k(x))
    return m.proj(torch.einsum("bhnm,bmd->bnhd", scores.softmax(-1), m.v(x)).flatten(2))


MULTI_QUERY = {
    "broadcast": lambda m, x: one_for_all(m, x, mixed),
    "broadcast, fused": lambda m, x: one_for_all(m, x, F.scaled_dot_product_attention),
    "expanded": lambda m, x: one_for_all(
        m, x, lambda q, *kv: F.scaled_dot_product_attention(q, *(y.expand(-1, HEADS, -1, -1) for y in kv))
    ),
    "expanded, not fused": lambda m, x: one_for_all(
        m, x, lambda q, *kv: mixed(q, *(y.expand(-1, HEADS, -1, -1) for y in kv))
    ),
    "expanded as another": lambda m, x: one_for_all(m, x, lambda q, *kv: mixed(q, *(y.expand_as(q) for y in kv))),
    "repeated": lambda m, x: one_for_all(m, x, lambda q, *kv: mixed(q, *(y.repeat(1, HEADS, 1, 1) for y in kv))),
    "repeated one by one": lambda m, x: one_for_all(
        m, x, lambda q, *kv: mixed(q, *(y.repeat_interleave(HEADS, 1) for y in kv))
    ),
    "grouped": lambda m, x: one_for_all(m, x, lambda *qkv: F.scaled_dot_product_attention(*qkv, enable_gqa=True)),
    "rows": as_rows,
    "einsum": by_einsum,
}  # fmt: skip
"""Shazeer, "Fast Transformer Decoding: One Write-Head is All You Need", section 3."""


@pytest.mark.parametrize("name", MULTI_QUERY)
def test_heads_die_whose_keys_and_values_are_all_heads(name):
    layers = {"q": nn.Linear(EMBED, INNER), "k": nn.Linear(EMBED, WIDTH), "v": nn.Linear(EMBED, WIDTH)}
    net = Net(MULTI_QUERY[name], **layers, proj=nn.Linear(INNER, 2)).double()
    found = analyse(net, (tokens(),)).channel_map
    assert (
        classes(found, "q.weight", 0) == classes(found, "proj.weight", 1) == [h for h in range(3) for _ in range(WIDTH)]
    )
    assert is_pinned(found, "k.weight", 0) and is_pinned(found, "v.weight", 0)
    assert_exact(net, (tokens(),))


def test_channels_die_one_by_one_where_all_are_weighed_alike():
    """Mehta and Rastegari, "Separable Self-attention for Mobile Vision Transformers", section 3.1."""

    def forward(m, x):
        query, k, v = m.qkv(x).split([1, INNER, INNER], -1)
        context = (query.softmax(1) * k).sum(1, keepdim=True)
        return m.proj(v.relu() * context.expand_as(v))

    net = Net(forward, qkv=nn.Linear(EMBED, 1 + 2 * INNER), proj=nn.Linear(INNER, 2)).double()
    found = analyse(net, (tokens(),)).channel_map
    assert classes(found, "proj.weight", 1) == list(range(INNER))
    assert classes(found, "qkv.weight", 0) == [ALWAYS, *range(INNER), *range(INNER)]
    assert_exact(net, (tokens(),))


def test_a_single_head_of_some_channels_loses_places_of_its_values():
    """Yun and Ro, "SHViT: Single-Head Vision Transformer with Memory Efficient Macro Design", section 3.2."""

    def forward(m, x):
        own, rest = x.split([4, EMBED - 4], -1)
        return m.proj(torch.cat([mixed(*m.qkv(own).split([WIDTH, WIDTH, 4], -1)), rest], -1).relu())

    inside = Net(forward, qkv=nn.Linear(4, 2 * WIDTH + 4), proj=nn.Linear(EMBED, 2))
    net = nn.Sequential(nn.Linear(EMBED, EMBED), inside).double()
    found = analyse(net, (tokens(),)).channel_map
    embedding, joint = classes(found, "0.weight", 0), classes(found, "1.proj.weight", 1)
    assert len({*embedding, *joint}) == EMBED + 4 and embedding[4:] == joint[4:]
    assert classes(found, "1.qkv.weight", 0) == [ALWAYS] * 2 * WIDTH + joint[:4]
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
