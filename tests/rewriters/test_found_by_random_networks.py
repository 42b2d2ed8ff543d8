"""Small networks that were once slimmed wrongly or not at all, each found by a random draw."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.rewriters.exactness import assert_exact
from tests.rewriters.helpers import Net, conv, image
from tests.rewriters.random_networks import Recipe
from tests.rewriters.test_random_networks import check, check_shortcuts, check_ways


def exact(forward, **members):
    return assert_exact(Net(forward, **members).double().eval(), (image().double(),))


def test_a_negative_slice_that_still_fits_but_means_other_channels():
    exact(lambda m, x: m.b(torch.cat([(y := m.a(x))[:, -2:, ...], y[:, :3], y[:, 3:4]], 1)), a=conv(3, 6), b=conv(6, 2))


def test_a_dead_operand_of_a_concatenation_that_comes_from_a_slice_of_a_tuple():
    exact(lambda m, x: m.b(torch.cat(m.a(x).chunk(2, 1)[::-1], 1)), a=conv(3, 4), b=conv(4, 2))


def test_a_dead_branch_that_is_interpolated():
    """Resizing refuses tensors without channels: the branch stays, one channel wide."""
    exact(
        lambda m, x: m.c(torch.cat([F.interpolate(m.a(x)[..., ::2, ::2], size=x.shape[2:]), m.b(x)], 1)),
        a=conv(3, 4), b=conv(3, 4), c=conv(8, 2),
    )  # fmt: skip


def test_a_dead_branch_beside_a_module_that_returns_a_dictionary():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = conv(4, 4), conv(4, 4)

        def forward(self, x):
            return {"first": self.a(x), "rest": [self.b(x)]}

    def forward(m, x):
        out = m.both(y := m.a(x))
        return m.c(torch.cat([out["first"] + y, *out["rest"]], 1))

    exact(forward, a=conv(3, 4), both=Both(), c=conv(8, 2))


def test_a_shape_read_off_another_tensor():
    """What has no form keeps its channels; where it has none because of a size read elsewhere, those keep theirs."""

    def forward(m, x):
        y = m.b(z := m.a(x))
        return m.c(y.flatten(2).transpose(1, 2).transpose(1, 2).reshape(z.shape))

    exact(forward, a=conv(3, 4), b=conv(4, 4), c=conv(4, 2))


@pytest.mark.parametrize(
    ("recipe", "share", "seed"),
    [
        (Recipe("image", 995, (("SplitAttention", 428),), "pool"), 0.2, 98),
        (Recipe("volume", 557, (("TwoStreams", 253), ("Attention", 493)), "pool"), 0.2, 110),
        (Recipe("image", 147, (("Pyramid", 278), ("Transposed", 4)), "pool", "dense"), 0.2, 276),
        (Recipe("image", 196, (("Partial", 813),), "pool"), 0.0, 387),
        (Recipe("image", 71, (("Statistics", 867), ("PixelShuffle", 833)), "pool"), 0.0, 3184),
        (Recipe("image", 692, (("SharedPlumbing", 661),), "pool"), 0.6, 39),
        (Recipe("image", 0, (("Written", 138),), "pool"), 0.6, 0),
    ],
    ids=lambda value: value.blocks[0][0] if isinstance(value, Recipe) else None,
)
def test_recipes_that_failed_once(recipe, share, seed):
    """Nothing left in a tensor, labels made after a cut, a module called in two ways, a mask of the example's size."""
    check(recipe, share, seed)


@pytest.mark.parametrize(
    ("recipe", "share", "seed"),
    [
        (Recipe("image", 692, (("SharedPair", 199), ("Partial", 405)), "auxiliary", "residual"), 0.6, 39),
        (Recipe("image", 464, (("Attention", 378), ("Nested", 715)), "keyword"), 0.6, 43),
        (Recipe("image", 941, (("Attention", 425), ("Depthwise", 967)), "dict", "residual"), 0.9, 67),
        (Recipe("image", 863, (("Res2", 401),), "pool", "two inputs"), 0.2, 223),
    ],
    ids=[
        "labels along the batch too",
        "a width read off the input",
        "two widths alike by chance",
        "labels made after the cut",
    ],
)
def test_recipes_whose_shortcuts_failed_once(recipe, share, seed):
    assert check_shortcuts(recipe, share, seed) > 0


def test_sizes_that_examples_of_other_sizes_scale_alike():
    """A whole shape with fewer channels: its other sizes, which differ in each example, are no part of the code."""
    assert check_ways(Recipe("image", 0, (("FoldedAttention", 683),), "pool"), 0.2, 700077) > 0
