"""Indexing by tensors: dimensions that are not indexed keep their labels."""

import pytest
import torch
from torch import nn

from rewriters.labelling.channel_map import ALWAYS
from tests.rewriters.exactness import assert_exact
from tests.rewriters.helpers import Net, classes, conv, image, is_pinned, mapped

INDICES = torch.tensor([[0, 3], [6, 1]])


def assert_exact_in_double(net, x):
    assert_exact(net.double(), (x.double(),))


@pytest.mark.parametrize(
    "pick",
    [
        lambda table, indices: table[indices].permute(2, 0, 1),
        lambda table, indices: table.t()[:, indices],
        lambda table, indices: table[indices.view(-1)].view(2, 2, -1).permute(2, 0, 1),
        lambda table, indices: table.index_select(0, indices.view(-1)).t().reshape(-1, 2, 2),
        lambda table, indices: nn.functional.embedding(indices, table).movedim(-1, 0),
    ],
)
def test_channels_of_a_table_go_with_those_they_are_added_to(pick):
    def forward(m, x):
        return m.b(m.a(x) + pick(m.table, m.indices))

    table = nn.Parameter(torch.randn(7, 4))
    members = {"a": conv(3, 4), "b": conv(4, 2), "table": table, "indices": INDICES}
    found = mapped(forward, image(size=2), **members)
    assert classes(found, "table", 1) == classes(found, "a.weight", 0) == [0, 1, 2, 3]
    assert is_pinned(found, "table", 0)
    assert_exact_in_double(Net(forward, **members), image(size=2))


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_channels_of_bags_of_rows(mode):
    ids = torch.tensor([[1, 2, 2], [0, 5, 6]])
    net = Net(lambda m, i: m.b(m.bag(i).relu()), bag=nn.EmbeddingBag(7, 8, mode=mode), b=nn.Linear(8, 2)).double()
    channel_map = assert_exact(net, (ids,)).analysis.channel_map
    assert classes(channel_map, "bag.weight", 1) == classes(channel_map, "b.weight", 1) == [*range(8)]
    assert is_pinned(channel_map, "bag.weight", 0)


def test_weights_of_rows_in_a_bag_stay():
    def forward(m, i, x):
        return m.b(nn.functional.embedding_bag(i, m.table, per_sample_weights=m.a(x), mode="sum"))

    members = {"a": nn.Linear(3, 2), "table": nn.Parameter(torch.randn(7, 8)), "b": nn.Linear(8, 2)}
    found = mapped(forward, INDICES, torch.randn(2, 3), **members)
    assert is_pinned(found, "a.weight", 0) and classes(found, "table", 1) == [*range(8)]


def test_channels_that_are_picked_stay():
    found = mapped(
        lambda m, x: m.b(m.a(x)[:, m.indices]), a=conv(3, 4), b=conv(2, 2), indices=torch.tensor([1, 3])
    )  # fmt: skip
    assert is_pinned(found, "a.weight", 0)
    assert classes(found, "b.weight", 1) == [ALWAYS] * 2


def test_two_indices_with_channels_between_them():
    def forward(m, x):
        return m.b(m.a(x) + m.table[m.indices, :, m.indices].permute(2, 0, 1))

    members = {"a": conv(3, 4), "b": conv(4, 2), "table": nn.Parameter(torch.randn(7, 4, 7)), "indices": INDICES}
    assert classes(mapped(forward, image(size=2), **members), "table", 1) == [0, 1, 2, 3]
    assert_exact_in_double(Net(forward, **members), image(size=2))


def test_heads_may_all_go_in_a_view_that_leaves_a_size_open():
    """All heads dead is no pattern that a view has to be written for: one stays wherever a layer runs."""

    def forward(m, x):
        q, k, v = m.qkv(x).view(x.shape[0], 2, 12, -1).chunk(3, dim=2)
        mixed = (v @ (q.transpose(-1, -2) @ k).softmax(-1)).view(x.shape[0], -1, *x.shape[2:])
        return m.proj(mixed)

    members = {"qkv": conv(3, 24), "proj": conv(8, 2)}
    found = mapped(forward, image(), **members)
    assert len(set(classes(found, "proj.weight", 1))) == 2
    assert_exact_in_double(Net(forward, **members), image())


def _kept_tokens(m, x, times=None):
    tokens = m.a(x).flatten(2).transpose(1, 2)
    first = m.order[None, :5, None].expand(len(tokens), -1, 1)
    return m.b(tokens.gather(1, first.repeat(1, 1, times or tokens.shape[2])).mean(1))


def test_tokens_are_gathered_with_all_their_channels():
    model = Net(_kept_tokens, a=conv(3, 8), b=nn.Linear(8, 2), order=torch.randperm(16))
    assert assert_exact(model.double(), (image().double(),)).analysis.channel_map.size == 8


def test_indices_of_their_own_for_each_channel_keep_it():
    own = mapped(lambda m, x: m.b(m.a(x).gather(2, m.places)), a=conv(3, 8), b=conv(8, 2),
                 places=torch.randint(4, (2, 8, 4, 4)))  # fmt: skip
    assert is_pinned(own, "a.weight", 0)
    along = mapped(lambda m, x: m.b(m.a(x).gather(1, m.places.expand(2, 8, 4, 4))), a=conv(3, 8), b=conv(8, 2),
                   places=torch.randint(8, (1, 1, 4, 4)))  # fmt: skip
    assert is_pinned(along, "a.weight", 0)
    few = mapped(lambda m, x: _kept_tokens(m, x, 6), a=conv(3, 8), b=nn.Linear(6, 2), order=torch.randperm(16))
    assert is_pinned(few, "a.weight", 0)
