"""Calls that hold a size, family by family: each is rewritten for the channels that are left."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rewriters.forwards.sizes import FAMILIES
from rewriters.outputs import relative_error, run_eval
from tests.rewriters.exactness import TOLERANCE, assert_exact, place_statistics, random_live, slim, zero_kernels
from tests.rewriters.helpers import Net, conv, image


def flip(parts: Iterable[Tensor]) -> Tensor:
    return torch.cat(list(parts)[::-1], 1)


def _assigned(m, y):
    out = y.clone()
    out[:, 2:5] = m.three(y)
    out[:, 7:] = 0.0
    return out


def _added_to(m, y):
    y[:, :3] += m.three(y)
    y[:, 3:, 1] *= 2
    return y


FORWARDS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "view": lambda m, y: y.view(y.shape[0], 2, 4, *y.shape[2:]).transpose(1, 2).reshape(y.shape),
    "view literal": lambda m, y: y.view(y.shape[0], 2, 4, y.shape[2], -1).mean(4).view(-1, 8, y.shape[2], 1),
    "view in a tuple": lambda m, y: y.view((y.size(0), 8, -1)).view(y.shape),
    "view of the batch": lambda m, y: y.view(y.shape[0] * 8, 1, *y.shape[2:]).relu().view(-1, 8, *y.shape[2:]),
    "view by math": lambda m, y: y.view(len(y), math.isqrt(y.shape[1] ** 2), -1).view(y.shape),
    "scale by math": lambda m, y: y.view(len(y), 8, -1).view(y.shape) * math.sqrt(y.shape[1]),
    "heads in the batch": lambda m, y: y.reshape(len(y) * 2, 4, -1).softmax(-1).reshape(y.shape),
    "heads in the batch, second": lambda m, y: (
        y.reshape(1, len(y) * 2, 4, -1).softmax(-1).reshape(len(y), 8, *y.shape[2:])
    ),
    "heads in the batch, expanded": lambda m, y: (y.reshape(len(y) * 2, 4, -1) * m.one.expand(len(y) * 2, 4, -1)).view(
        y.shape
    ),
    "heads in the batch, repeated": lambda m, y: (
        y.reshape(-1, 4, y.shape[2] * y.shape[3]) * m.one.repeat(2 * y.shape[0], 1, 1)
    ).view(y.shape),
    "reshape": lambda m, y: y.reshape(y.shape[0], 8, -1).softmax(-1).reshape(-1, 8, *y.shape[2:]),
    "torch.reshape": lambda m, y: torch.reshape(y, (y.shape[0], 4, 2, -1)).flatten(1, 2).view(y.shape),
    "reshape by keyword": lambda m, y: torch.reshape(input=y, shape=(-1, 8, y.shape[2] * y.shape[3])).view_as(y),
    "expand": lambda m, y: y.mean((2, 3), keepdim=True).expand(-1, 8, *y.shape[2:]),
    "expand new": lambda m, y: y.mean(0, keepdim=True).expand(y.shape[0], 8, y.shape[2], y.shape[3]),
    "expand one": lambda m, y: y * y.mean(1, keepdim=True).expand(-1, 8, -1, -1),
    "expand first": lambda m, y: y * m.one.expand(8, 1, 1),
    "repeat": lambda m, y: y * y.mean(1, keepdim=True).repeat(1, 8, 1, 1),
    "repeat by keyword": lambda m, y: y * y.mean(1, keepdim=True).repeat(repeats=[1, 8, 1, 1]),
    "repeat interleaved": lambda m, y: y * y.mean(1, keepdim=True).repeat_interleave(8, 1),
    "torch.repeat_interleave": lambda m, y: y * torch.repeat_interleave(y.mean(1, True), repeats=8, dim=-3),
    "new_zeros": lambda m, y: y + y.new_zeros(1, 8, 1, 1),
    "new_full": lambda m, y: y * y.new_full((8, 1, 1), 0.5),
    "zeros": lambda m, y: y + torch.zeros(y.shape[0], 8, 1, 1, dtype=y.dtype),
    "ones": lambda m, y: y * torch.ones((8, 1, 1), dtype=y.dtype),
    "full by keyword": lambda m, y: y * torch.full(size=(8, 1, 1), fill_value=2.0, dtype=y.dtype),
    "unflatten": lambda m, y: y.unflatten(1, (2, 4)).softmax(1).flatten(1, 2),
    "torch.unflatten": lambda m, y: torch.unflatten(y, -3, (2, 4)).softmax(1).flatten(1, 2),
    "unflatten by keyword": lambda m, y: y.unflatten(dim=1, sizes=(2, 4)).softmax(1).flatten(1, 2),
    "chunk": lambda m, y: flip(y.chunk(2, 1)),
    "uneven chunk": lambda m, y: flip(y.chunk(3, 1)),
    "chunk by keyword": lambda m, y: flip(torch.chunk(input=y, chunks=2, dim=1)),
    "chunk from behind": lambda m, y: flip(y.chunk(2, dim=-3)),
    "split": lambda m, y: flip(y.split(3, 1)),
    "split sizes": lambda m, y: flip(torch.split(y, [1, 5, 2], dim=1)),
    "split_with_sizes": lambda m, y: flip(y.split_with_sizes([3, 5], dim=1)),
    "tensor_split": lambda m, y: flip(torch.tensor_split(y, (3, 5), dim=1)),
    "split, keyword first": lambda m, y: flip(torch.split(dim=1, split_size_or_sections=4, tensor=y)),
    "slice": lambda m, y: torch.cat([y[:, 3:], y[:, :3]], 1),
    "negative slice": lambda m, y: torch.cat([y[:, -3:], y[:, :-3]], 1),
    "slice with dots": lambda m, y: torch.cat([y[..., 3:, :, :], y[:, :3, ...]], 1),
    "slice with None": lambda m, y: torch.cat([y[None, :, 3:][0], y[:, None, :3][:, 0]], 1),
    "open slice": lambda m, y: torch.cat([y[:, 5:100], y[:, :5]], 1),
    "strided pixels": lambda m, y: F.interpolate(y[:, 2:, ::2, 1::2], scale_factor=2).repeat(1, 2, 1, 1)[:, 2:10],
    "narrow": lambda m, y: torch.cat([y.narrow(1, 3, 5), torch.narrow(y, 1, 0, 3)], 1),
    "narrow by keyword": lambda m, y: torch.cat([y.narrow(length=5, start=3, dim=1), y.narrow(1, 0, 3)], 1),
    "pad": lambda m, y: F.pad(y, (0, 0, 0, 0, 2, 1))[:, 3:],
    "pad by keyword": lambda m, y: torch.cat([F.pad(input=y[:, :4], pad=(0, 0, 0, 0, 1, 3), value=0.5)], 1),
    "negative pad": lambda m, y: F.pad(y, (0, 0, 0, 0, -2, 2)),
    "roll": lambda m, y: y.roll(3, 1),
    "roll back": lambda m, y: torch.roll(y, shifts=(-2, 1), dims=(1, 2)),
    "channel_shuffle": lambda m, y: F.channel_shuffle(y, 2),
    "grouped": lambda m, y: F.conv2d(y, m.grouped, None, 1, 1, 1, 4),
    "grouped by keyword": lambda m, y: F.conv2d(input=y, weight=m.grouped, groups=4, padding=1),
    "transposed": lambda m, y: F.conv_transpose2d(y, m.grouped, padding=1, groups=4),
    "layer_norm": lambda m, y: F.layer_norm(y.movedim(1, -1), (8,), m.vector).movedim(-1, 1),
    "layer_norm by keyword": lambda m, y: F.layer_norm(input=y, normalized_shape=[8, y.shape[2], y.shape[3]]),
    "rms_norm": lambda m, y: F.rms_norm(y.movedim(1, -1), [8], m.vector).movedim(-1, 1),
    "group_norm": lambda m, y: F.group_norm(y, 4, m.vector),
    "group_norm by keyword": lambda m, y: F.group_norm(y, num_groups=4, bias=m.vector),
    "group_norm of places": lambda m, y: F.group_norm(y, 2, m.vector),
    "slice assigned": _assigned,
    "slice added to": _added_to,
}
"""The ways each family is written. A forward takes the network and `y` with 8 channels, and returns 8 channels."""


def network(name: str) -> nn.Module:
    torch.manual_seed(0)
    held = FORWARDS[name]
    more = {"grouped": nn.Parameter(torch.randn(8, 2, 3, 3)), "vector": nn.Parameter(torch.randn(8))}
    more["one"] = nn.Parameter(torch.rand(1, 1, 1) + 0.5)
    return Net(lambda m, x: m.b(held(m, m.a(x))), a=conv(3, 8), three=conv(8, 3), b=conv(8, 2), **more).double().eval()


@pytest.mark.parametrize("name", FORWARDS)
def test_sizes_are_written_for_what_is_left(name):
    slimmed = assert_exact(network(name), (image().double(),))
    assert slimmed.analysis.channel_map.size > 0, slimmed.analysis.channel_map.pins


@pytest.mark.parametrize("name", FORWARDS)
def test_rewritten_sizes_hold_for_other_batches_and_resolutions(name):
    slim_model, gated = network(name), network(name)
    example = image(batch=2).double()
    slimmed = slim(slim_model, (example,), share=0.6, seed=1)
    channel_map = slimmed.analysis.channel_map
    live = random_live(channel_map.size, 0.6, 1)
    zero_kernels(gated, channel_map, live)
    place_statistics(gated, slimmed.analysis, live)
    for other in (image(batch=3), image(batch=1), image(size=6)):
        wanted, got = (run_eval(model, (other.double(),)) for model in (gated, slim_model))
        assert relative_error(got, wanted) <= TOLERANCE


@pytest.mark.parametrize(
    "scramble",
    [
        lambda rows, x: rows.reshape(len(x), 8, *x.shape[2:]),
        lambda rows, x: rows.reshape(len(x), -1).view(len(x), -1, *x.shape[2:]),
        lambda rows, x: rows.contiguous().view(len(x), 8, *x.shape[2:]),
    ],
)
def test_channels_that_would_go_with_others_at_another_resolution_stay(scramble):
    """As in MAnet's attention, which takes (positions, channels) for (channels, positions)."""
    torch.manual_seed(0)
    a, b, c = conv(3, 8), conv(8, 6), conv(6, 2)
    model = Net(lambda m, x: m.c(m.b(scramble(m.a(x).flatten(2).mT, x)).relu()), a=a, b=b, c=c).double().eval()
    gated = copy.deepcopy(model)
    slimmed = slim(model, (image(size=2).double(),), share=0.6, seed=1)
    assert slimmed.error <= TOLERANCE and (model.a.out_channels, model.b.in_channels) == (8, 8)
    assert any("the size of its input decides" in pin.reason for pin in slimmed.analysis.channel_map.pins)
    assert model.b.out_channels == model.c.in_channels < 6
    zero_kernels(gated, slimmed.analysis.channel_map, random_live(slimmed.analysis.channel_map.size, 0.6, 1))
    for other in (image(size=2, batch=3).double(), image(size=5).double()):
        assert relative_error(run_eval(model, (other,)), run_eval(gated, (other,))) <= TOLERANCE


def test_a_reshape_that_other_resolutions_fail_at_takes_its_channels_along(capfd):
    """There is no other size to tell classes apart at, and what fails at one isn't told of."""
    torch.manual_seed(0)
    a, b, table = conv(3, 8), conv(8, 2), nn.Parameter(torch.randn(8, 2, 2))
    model = Net(
        lambda m, x: m.b((m.a(x) + m.table).flatten(2).mT.reshape(x.shape[0], 8, 2, 2)), a=a, b=b, table=table
    ).double()
    slimmed = assert_exact(model, (image(size=2).double(),))
    assert slimmed.analysis.channel_map.size == 2 and "failed" not in capfd.readouterr().err


def test_every_family_has_a_test():
    families = {family.__name__ for family in FAMILIES.values()}
    assert families == {
        "reshape", "create", "unflatten", "split", "index", "narrow", "pad", "roll", "channel_shuffle", "convolve",
        "layer_norm", "group_norm", "attention", "repeat",
    }  # fmt: skip


@pytest.mark.parametrize(("shift", "gates"), [(48, 5), (3, 5 + 1)])
def test_a_roll_of_all_elements_in_a_row_keeps_its_channels_or_loses_them_all(shift, gates):
    model = Net(lambda m, x: m.c(torch.roll(m.b(m.a(x)), shift)), a=conv(3, 5), b=conv(5, 8), c=conv(8, 2))
    slimmed = assert_exact(model.double().eval(), (image().double(),))
    assert slimmed.analysis.channel_map.size == gates


def test_a_call_of_no_family_keeps_its_channels():
    model = Net(lambda m, x: m.b(torch.diagonal(m.a(x), 1, 2, 1)[..., None]), a=conv(3, 8), b=conv(2, 2))
    assert_exact(model.double().eval(), (image(size=2).double(),))
