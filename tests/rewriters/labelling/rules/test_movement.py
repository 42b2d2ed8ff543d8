"""Ops that move data move labels the same way."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from rewriters.labelling.channel_map import ALWAYS
from rewriters.labelling.rules import RULES, movement
from tests.rewriters.exactness import assert_exact
from tests.rewriters.helpers import Net, analysed, classes, conv, image, is_pinned, mapped, reasons


def test_cat_concatenates_channels():
    found = mapped(lambda m, x: m.c(torch.cat([m.a(x), m.b(x)], 1)), a=conv(3, 2), b=conv(3, 3), c=conv(5, 2))
    assert classes(found, "c.weight", 1) == classes(found, "a.weight", 0) + classes(found, "b.weight", 0)
    assert found.size == 5


def test_every_rule_here_but_padding_is_checked_as_a_move():
    rules = {rule for rule in RULES.values() if rule.__module__ == movement.__name__}
    assert rules - {movement.pad} == set(movement.RULES_THAT_MOVE)


def test_a_forward_that_only_reorders_dimensions_holds_no_size_and_is_not_traced():
    def forward(m: Net, x: torch.Tensor) -> torch.Tensor:
        rows = m.a(x).flip(1).permute(0, 2, 3, 1).unsqueeze(0).transpose(2, 3)
        return m.b(rows.sum(0).movedim(-1, 1))

    analysis = analysed(forward, a=conv(3, 6), b=conv(6, 2))
    assert analysis.traced == [] and analysis.channel_map.size == 6
    assert_exact(Net(forward, a=conv(3, 6), b=conv(6, 2)).double(), (image().double(),))


def test_cat_with_the_input_pins_its_channels_alone():
    found = mapped(lambda m, x: m.c(torch.cat([x, m.a(x)], 1)), a=conv(3, 2), c=conv(5, 2))
    assert classes(found, "c.weight", 1) == [ALWAYS] * 3 + [0, 1]


def test_cat_along_the_batch_couples_channels():
    found = mapped(lambda m, x: m.c(torch.cat([m.a(x), m.b(x)], 0)), a=conv(3, 4), b=conv(3, 4), c=conv(4, 2))
    assert classes(found, "a.weight", 0) == classes(found, "b.weight", 0) == [0, 1, 2, 3]


def test_stack_couples_channels():
    found = mapped(lambda m, x: m.c(torch.stack([m.a(x), m.b(x)], 1).mean(1)), a=conv(3, 4), b=conv(3, 4), c=conv(4, 2))
    assert classes(found, "a.weight", 0) == classes(found, "b.weight", 0) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("move", "order"),
    [
        (lambda x: x.flip(1), [3, 2, 1, 0]),
        (lambda x: x.roll(1, 1), [3, 0, 1, 2]),
        (lambda x: torch.roll(x, shifts=-1, dims=1), [1, 2, 3, 0]),
        (lambda x: torch.cat(x.chunk(2, 1)[::-1], 1), [2, 3, 0, 1]),
        (lambda x: torch.cat(x.split([1, 3], 1)[::-1], 1), [1, 2, 3, None]),
        (lambda x: torch.cat([x[:, 2:], x[:, :2]], 1), [2, 3, 0, 1]),
        (lambda x: torch.cat([x.narrow(1, 2, 2), x.narrow(1, 0, 2)], 1), [2, 3, 0, 1]),
        (lambda x: x.permute(0, 2, 3, 1).transpose(1, 3).transpose(2, 3), [0, 1, 2, 3]),
        (lambda x: x.unsqueeze(1).squeeze(1), [0, 1, 2, 3]),
        (lambda x: x.repeat(1, 1, 2, 1), [0, 1, 2, 3]),
        (lambda x: x.movedim(1, -1).movedim(-1, 1), [0, 1, 2, 3]),
    ],
)
def test_moves_reorder_channels(move, order):
    found = mapped(lambda m, x: m.b(move(m.a(x))), a=conv(3, 4), b=conv(4, 2))
    first = classes(found, "a.weight", 0)
    assert classes(found, "b.weight", 1) == [ALWAYS if i is None else first[i] for i in order]


def test_repeated_channels_are_one_class():
    found = mapped(lambda m, x: m.b(m.a(x).repeat(1, 2, 1, 1)), a=conv(3, 2), b=conv(4, 2))
    assert classes(found, "b.weight", 1) == [0, 1, 0, 1]
    found = mapped(lambda m, x: m.b(m.a(x).repeat_interleave(2, 1)), a=conv(3, 2), b=conv(4, 2))
    assert classes(found, "b.weight", 1) == [0, 0, 1, 1]


def test_flatten_spreads_channels_over_positions():
    found = mapped(lambda m, x: m.fc(m.a(x).flatten(1)), image(3, 2), a=conv(3, 2), fc=nn.Linear(8, 5))
    assert classes(found, "fc.weight", 1) == [0, 0, 0, 0, 1, 1, 1, 1]


def test_pixel_shuffle_gathers_four_channels_into_one():
    found = mapped(lambda m, x: m.b(F.pixel_shuffle(m.a(x), 2)), a=conv(3, 8), b=conv(2, 2))
    assert classes(found, "a.weight", 0) == [0, 0, 0, 0, 1, 1, 1, 1]
    assert classes(found, "b.weight", 1) == [0, 1]


def test_pixel_unshuffle_spreads_a_channel_over_four():
    found = mapped(lambda m, x: m.b(F.pixel_unshuffle(m.a(x), 2)), a=conv(3, 2), b=conv(8, 2))
    assert classes(found, "b.weight", 1) == [0, 0, 0, 0, 1, 1, 1, 1]


def test_channel_shuffle_keeps_groups_as_wide_as_each_other():
    found = mapped(lambda m, x: m.b(F.channel_shuffle(m.a(x), 2)), a=conv(3, 6), b=conv(6, 2))
    assert classes(found, "a.weight", 0) == [0, 1, 2, 0, 1, 2]
    assert classes(found, "b.weight", 1) == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize("groups", [2, 3])
def test_channel_shuffle_modules_are_exact(groups):
    """A module of torch's own that holds how many groups there are."""
    model = nn.Sequential(conv(3, 6), nn.ChannelShuffle(groups), conv(6, 2)).double().eval()
    assert_exact(model, (image().double(),))


@pytest.mark.parametrize(
    ("dims", "expected"), [((3, 4), [0, 1, 2, 3, 0, 1, 2, 3]), ((2, 3, 4), [0, 0, 0, 0, 1, 1, 1, 1])]
)
def test_views_that_split_channels_let_whole_rows_or_columns_die(dims, expected):
    def heads(m, x):
        y = m.a(x).view(x.shape[0], 2, 4, *x.shape[2:])
        return m.b((y * y.mean(dims, keepdim=True)).flatten(1, 2))

    found = mapped(heads, a=conv(3, 8), b=conv(8, 2))
    assert classes(found, "a.weight", 0) == expected


def test_of_two_labelled_dimensions_flattened_into_one_the_inner_one_stays():
    def outer(m, x):
        a, b = m.a(x).flatten(2), m.b(x).flatten(2)
        return m.fc((a @ b.transpose(1, 2)).flatten(1))

    members = {"a": conv(3, 2), "b": conv(3, 3), "fc": nn.Linear(6, 2)}
    found = mapped(outer, **members)
    assert classes(found, "a.weight", 0) == [0, 1]
    assert classes(found, "fc.weight", 1) == [0, 0, 0, 1, 1, 1]
    assert is_pinned(found, "b.weight", 0)
    assert any("two labelled dimensions" in reason for reason in reasons(found, "b.weight", 0))
    assert_exact(Net(outer, **members).double().eval(), (image().double(),))


@pytest.mark.parametrize("repeat", [lambda y: y.expand(-1, 3, -1, -1, -1), lambda y: y.repeat(1, 3, 1, 1, 1)])
def test_a_repeated_number_s_places_yield_to_channels_that_they_are_flattened_with(repeat):
    forward = lambda m, x: m.b(repeat(m.a(x)[:, None]).flatten(1, 2))  # noqa: E731
    found = mapped(forward, a=conv(3, 4), b=conv(12, 2))
    assert classes(found, "a.weight", 0) == [0, 1, 2, 3]
    assert classes(found, "b.weight", 1) == 3 * [0, 1, 2, 3]
    assert_exact(Net(forward, a=conv(3, 4), b=conv(12, 2)).double().eval(), (image().double(),))


def test_rows_that_each_sample_gets_keep_their_columns_free_when_samples_and_rows_are_flattened():
    forward = lambda m, x: m.b(m.rows.expand(len(x), -1, -1).flatten(0, 1)) + x.mean()  # noqa: E731
    members = {"rows": nn.Parameter(torch.randn(1, 4, 6)), "b": nn.Linear(6, 2)}
    assert classes(mapped(forward, **members), "rows", 2) == [0, 1, 2, 3, 4, 5]
    assert_exact(Net(forward, **members).double().eval(), (image().double(),))


def test_one_number_for_all_of_a_parameter():
    forward = lambda m, x: m.b(m.a(x) * m.scale.expand(4).view(4, 1, 1))  # noqa: E731
    members = {"a": conv(3, 4), "b": conv(4, 2), "scale": nn.Parameter(torch.rand(1))}
    assert classes(mapped(forward, **members), "a.weight", 0) == [0, 1, 2, 3]
    assert_exact(Net(forward, **members).double().eval(), (image().double(),))


def test_a_single_channel_picked_pins_it():
    found = mapped(lambda m, x: m.b(m.a(x)) + m.a(x)[:, 1:2], a=conv(3, 4), b=conv(4, 2))
    assert classes(found, "a.weight", 0) == [0, ALWAYS, 1, 2]


def test_padded_channels_are_classes_of_their_own():
    found = mapped(lambda m, x: m.b(F.pad(m.a(x), (0, 0, 0, 0, 1, 2))), a=conv(3, 2), b=conv(5, 2))
    assert sorted(classes(found, "b.weight", 1)) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    "zeros",
    [
        lambda x, n: torch.zeros(x.shape[0], n, *x.shape[2:], dtype=x.dtype),
        lambda x, n: torch.zeros((x.shape[0], n, x.shape[2], x.shape[3]), dtype=x.dtype, device=x.device),
        lambda x, n: torch.full((x.size(0), n, x.size(2), x.size(3)), 0.5, dtype=x.dtype),
        lambda x, n: torch.ones(size=(x.shape[0], n, *x.shape[2:]), dtype=x.dtype),
        lambda x, n: x.new_zeros(x.shape[0], n, *x.shape[2:]),
        lambda x, n: x.new_full((x.shape[0], n, *x.shape[2:]), 0.1),
    ],
)
def test_channels_made_in_the_forward_are_classes_of_their_own(zeros):
    def forward(m, x):
        y = m.a(x)
        return m.b(torch.cat([y, zeros(y, 3)], 1))

    model = Net(forward, a=conv(3, 4), b=conv(7, 2)).double().eval()
    slimmed = assert_exact(model, (image().double(),))
    assert slimmed.analysis.channel_map.size == 7


class Padded(nn.Module):
    def forward(self, x):
        return F.pad(x, (0, 0, 0, 0, 2, 3))


@pytest.mark.parametrize("pad", [Padded(), nn.ConstantPad3d((0, 0, 0, 0, 2, 3), 0.0)])
def test_padding_in_a_module_of_its_own_is_coupled_with_what_follows(pad):
    """Traced, the padding makes channels anew: they must be those that the next module's kernel dies with."""
    slimmed = assert_exact(nn.Sequential(conv(3, 8), pad, conv(13, 4)).double().eval(), (image().double(),))
    assert slimmed.analysis.channel_map.size == 13


def test_index_by_a_permutation_pins():
    found = mapped(
        lambda m, x: m.b(m.a(x).index_select(1, m.order)), a=conv(3, 4), b=conv(4, 2), order=torch.tensor([2, 0, 1, 3])
    )
    assert is_pinned(found, "a.weight", 0)


@pytest.mark.parametrize(
    "nothing", [lambda y: y[..., :0], lambda y: y.split([0, 4], 3)[0], lambda y: y.narrow(3, 2, 0)]
)
def test_what_is_cut_to_nothing_keeps_its_other_channels(nothing):
    """Attention with rotary positions cuts off as many prefix tokens as there are: none, often."""

    def forward(m, x):
        y = m.a(x)
        return m.b(torch.cat([nothing(y), y * 2], 3))

    found = mapped(forward, a=conv(3, 4), b=conv(4, 2))
    assert classes(found, "a.weight", 0) == classes(found, "b.weight", 1) == [0, 1, 2, 3]
    assert_exact(Net(forward, a=conv(3, 4), b=conv(4, 2)).double().eval(), (image().double(),))
