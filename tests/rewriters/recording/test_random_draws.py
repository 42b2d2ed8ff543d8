"""Draws that give one number, so that runs whose draws have other shapes can be compared."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from rewriters.recording import OneNumber, is_draw

DRAWS = {
    "rand": lambda n: torch.rand(2, n),
    "rand_like": lambda n: torch.rand_like(torch.ones(n)),
    "randn": lambda n: torch.randn(n),
    "randn in double": lambda n: torch.randn(n, 2, dtype=torch.double).float(),
    "randint": lambda n: torch.randint(3, 9, (n,)),
    "randint to": lambda n: torch.randint(9, (n,)),
    "randint_like": lambda n: torch.randint_like(torch.ones(n), 9),
    "random": lambda n: torch.ones(n).random_(),
    "random between": lambda n: torch.ones(n).random_(3, 9),
    "normal": lambda n: torch.normal(2.0, 0.5, (n,)),
    "normal in place": lambda n: torch.ones(n).normal_(2.0, 0.5),
    "uniform": lambda n: torch.ones(n).uniform_(2.0, 3.0),
    "exponential": lambda n: torch.ones(n).exponential_(),
    "log normal": lambda n: torch.ones(n).log_normal_(),
    "cauchy": lambda n: torch.ones(n).cauchy_(),
    "geometric": lambda n: torch.ones(n).geometric_(0.3),
    "bernoulli": lambda n: torch.ones(n).bernoulli_(0.3),
    "dropout": lambda n: F.dropout(torch.ones(n), training=True),
    "own generator": lambda n: torch.randn(n, generator=torch.Generator()),
}


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
def test_a_draw_is_one_number_whatever_its_shape_and_whatever_was_drawn_before(draw):
    with torch.no_grad(), OneNumber(3) as one:
        few = draw(2)
    with torch.no_grad(), OneNumber(3) as other:
        torch.rand(7)
        many = draw(40)
    assert many.unique().equal(few.unique()) and many.unique().numel() == 1
    assert len(one.drawn) == 1 and one.drawn != other.drawn
    with torch.no_grad():
        seeds = []
        for seed in range(8):
            with OneNumber(seed):
                seeds.append(draw(3))
    assert torch.stack(seeds).unique().numel() > 1


OF_TENSORS = (
    torch.randperm,
    lambda n: torch.ones(n).multinomial(n),
    lambda n: torch.full((n,), 0.5).bernoulli(),
    lambda n: torch.normal(torch.ones(n), torch.ones(n)),
)


@pytest.mark.parametrize("draw", OF_TENSORS)
def test_what_can_t_be_one_number_is_the_same_for_the_same_shape(draw):
    found = []
    for before in (1, 5):
        with OneNumber(3):
            torch.rand(before)
            found.append(draw(20))
    assert torch.equal(*found) and found[0].unique().numel() > 1


def test_an_op_that_is_told_not_to_draw_does_not():
    aten, x = torch.ops.aten, torch.ones(2, 1, 2, 4)
    assert is_draw(aten.native_dropout.default, (x, 0.5, True), {})
    assert not is_draw(aten.native_dropout.default, (x, 0.5, False), {})
    attention = aten._scaled_dot_product_flash_attention_for_cpu.default
    assert not is_draw(attention, (x, x, x), {}) and is_draw(attention, (x, x, x, 0.1), {})
    assert not is_draw(aten.add.Tensor, (x, x), {})
