"""Writing into tensors couples channels that meet, and pins channels that are known by number."""

import pytest
import torch
from torch import nn

from rewriters.labelling.channel_map import ALWAYS
from tests.rewriters.exactness import assert_exact, slim
from tests.rewriters.helpers import Net, classes, conv, image, is_pinned, mapped, reasons

PLACES = torch.tensor([0, 2])
MASK = torch.arange(32).view(2, 4, 4) % 3 == 0


def assigned(x, keys, written):
    """A copy of x with x[keys] = written."""
    x = x.clone()
    x[keys] = written
    return x


def in_tokens(x, mask, written):
    """Written under a mask of positions, channels last."""
    return assigned(x.movedim(1, -1), mask, written).movedim(-1, 1)


ALONE = {
    "a number under a mask of their own": lambda m, x: assigned(x, x < 0, 0.5),
    "a number under a mask of positions": lambda m, x: in_tokens(x, m.mask, 0.5),
    "a vector under a mask of positions": lambda m, x: in_tokens(x, m.mask, m.token),
    "index_fill": lambda m, x: x.index_fill(2, m.places, 0.5),
    "the largest alone": lambda m, x: torch.zeros_like(x).scatter(-1, x.topk(2, -1).indices, 1.0) * x,
}

CONSTANTS = {"mask": MASK, "places": PLACES, "grid": torch.tensor([[0], [3], [1], [2]])}


@pytest.mark.parametrize("write", ALONE.values(), ids=ALONE.keys())
def test_channels_that_are_written_to_may_go(write):
    def forward(m, x):
        return m.b(write(m, m.a(x))).mean((2, 3))

    members = {"a": conv(3, 8), "b": conv(8, 2), "token": nn.Parameter(torch.randn(8)), **CONSTANTS}
    found = mapped(forward, **members)
    assert classes(found, "a.weight", 0) == classes(found, "b.weight", 1) == list(range(8))
    assert_exact(Net(forward, **members).double(), (image().double(),))


WRITING = {
    "rows by number": lambda m, x, other: assigned(x, (slice(None), slice(None), m.places), other[:, :, 2:]),
    "a column by its number": lambda m, x, other: assigned(x, (..., m.places[1:]), other[..., :1]),
    "a grid of columns": lambda m, x, other: assigned(x, (..., m.grid), other[..., None]),
    "keys that stand apart": lambda m, x, other: assigned(x, (m.places // 2, slice(None), m.places), other[:, :, 1]),
    "under a mask of their own": lambda m, x, other: assigned(x, other < 0, 0.5),
    "index_add": lambda m, x, other: x.index_add(2, m.places, other[:, :, 2:], alpha=2),
    "index_copy": lambda m, x, other: x.index_copy(-1, m.places, other[..., 2:]),
    "index_reduce": lambda m, x, other: x.index_reduce(2, m.places, other[:, :, 2:], "amax"),
    "scatter": lambda m, x, other: x.scatter(2, x.argsort(2), other),
    "scatter, by the indices": lambda m, x, other: x.scatter(2, other.argsort(2), 0.5),
    "scatter_add": lambda m, x, other: x.clone().scatter_add_(2, x.argsort(2), other),
    "scatter_reduce": lambda m, x, other: x.scatter_reduce(2, x.argsort(2), other, "amin"),
    "slice_scatter": lambda m, x, other: x.slice_scatter(other[..., 2:], 3, 0, 2),
    "select_scatter": lambda m, x, other: x.select_scatter(other[..., 0], 3, 1),
    "diagonal_scatter": lambda m, x, other: x.diagonal_scatter(other[..., 0], 0, 2, 3),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:index_reduce")
@pytest.mark.parametrize("write", WRITING.values(), ids=WRITING.keys())
def test_channels_go_with_those_that_are_written_to_them(write):
    def forward(m, x):
        return m.b(write(m, m.a(x), m.c(x))).mean((2, 3))

    members = {"a": conv(3, 8), "c": conv(3, 8), "b": conv(8, 2), **CONSTANTS}
    found = mapped(forward, **members)
    assert classes(found, "a.weight", 0) == classes(found, "b.weight", 1) == list(range(8))
    assert classes(found, "c.weight", 0) == list(range(8))
    assert_exact(Net(forward, **members).double(), (image().double(),))


def test_a_vector_that_is_written_goes_with_the_channels():
    found = mapped(lambda m, x: m.b(in_tokens(m.a(x), m.mask, m.token)), a=conv(3, 4), b=conv(4, 2),
                   token=nn.Parameter(torch.randn(4)), mask=MASK)  # fmt: skip
    assert classes(found, "token", 0) == classes(found, "a.weight", 0) == [0, 1, 2, 3]


def test_slices_of_channels_go_with_those_they_are_exchanged_for():
    def forward(m, x):
        return m.b(m.a(x).slice_scatter(m.c(x)[:, :4], 1, 4, 8))

    found = mapped(forward, a=conv(3, 8), c=conv(3, 8), b=conv(8, 2))
    assert classes(found, "c.weight", 0)[:4] == classes(found, "b.weight", 1)[4:]
    assert classes(found, "a.weight", 0) == classes(found, "b.weight", 1)


KEEPING = {
    "channels by number": lambda m, x: assigned(x, (slice(None), m.places), x[:, :2]),
    "a mask of channels that nobody owns": lambda m, x: assigned(x, m.mask, 0.5),
    "a vector that nobody owns": lambda m, x: in_tokens(x, m.mask[:, 0], m.mask[0, 0, 0].to(x.dtype)),
    "several numbers under a mask": lambda m, x: x.index_put((x > 9,), m.numbers[:0]),
    "all or nothing": lambda m, x: x.index_put((m.mask[0, 0, 0, 0],), m.numbers[0]),
    "channels added to by number": lambda m, x: x.index_add(1, m.places, x[:, :2]),
    "channels filled by number": lambda m, x: x.index_fill(1, m.places, 0.5),
    "scattered channels": lambda m, x: x.scatter(1, x.argsort(1), x),
    "scattered from few channels": lambda m, x: x.scatter(2, x[:, :2].argsort(2), x[:, :2]),
    "sorted places as indices": lambda m, x: x.index_fill(2, x.mean((0, 2, 3)).argsort()[:2] % 4, 0.5),
}  # fmt: skip


@pytest.mark.parametrize("write", KEEPING.values(), ids=KEEPING.keys())
def test_channels_told_by_number_stay(write):
    members = {"places": PLACES, "mask": MASK[:, None] ^ MASK[..., None], "numbers": torch.randn(4)}
    found = mapped(lambda m, x: m.b(write(m, m.a(x))), a=conv(3, 4), b=conv(4, 2), **members)
    assert is_pinned(found, "a.weight", 0)
    assert reasons(found, "a.weight", 0)


def test_a_single_channel_that_is_written_stays():
    def forward(m, x):
        return m.b(m.a(x).select_scatter(m.c(x)[:, 0], 1, 2))

    found = mapped(forward, a=conv(3, 4), c=conv(3, 1), b=conv(4, 2))
    assert classes(found, "a.weight", 0) == [0, 1, ALWAYS, 2]


def test_what_is_written_to_in_a_forward_that_holds_sizes_shrinks_with_it():
    def forward(m, x):
        first, second = m.a(x).chunk(2, 1)  # a size: this forward is rewritten
        y = torch.cat([second, first], 1)
        y[y < 0] = 0.5
        y[:, :4, m.places] = 0.25
        y[0, 4:, None, ..., [1, 3]] = second[1, :, None, :, 2:]
        y[:, 4:, 0], y[:, 6:, m.places, 1] = first[:, :, 1], y[:, 6:, m.places, 2]
        return m.b(y).mean((2, 3))

    model = Net(forward, a=conv(3, 8), b=conv(8, 2), places=PLACES).double()
    assert assert_exact(model, (image().double(),)).analysis.channel_map.size == 4
    assert "forward" in vars(slim(model, (image().double(),)).model)
