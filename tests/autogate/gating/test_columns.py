"""Arithmetic on the columns of kernels."""

import pytest
import torch

from autogate.gating import columns
from autogate.gating.columns import column_products, scale_columns


@pytest.mark.parametrize("kind", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided", "odd gradient"])
@pytest.mark.parametrize("dim", [0, 1])
def test_column_products_and_scaling_hold_for_any_type_and_layout(kind, layout, dim):
    torch.manual_seed(0)
    weight, gradient = torch.randn(6, 4, 3, 3).to(kind), torch.randn(6, 4, 3, 3).to(kind)
    if layout == "channels_last":
        weight, gradient = (t.to(memory_format=torch.channels_last) for t in (weight, gradient))
    if layout == "strided":
        weight = torch.randn(6, 8, 3, 3).to(kind)[:, ::2]
    if layout == "odd gradient":
        gradient = gradient.to(memory_format=torch.channels_last)
    others = [d for d in range(4) if d != dim]
    expected = (weight.double() * gradient.double()).sum(others)
    (found,) = column_products([gradient], [weight], dim)
    assert found.dtype == torch.promote_types(kind, torch.float32)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)
    factor = torch.rand(weight.shape[dim])
    shape = [-1 if d == dim else 1 for d in range(4)]
    expected = weight * factor.to(kind).view(shape)
    scale_columns([weight], dim, factor[None])
    assert torch.equal(weight, expected)


def test_half_precision_gradients_do_not_vanish_in_the_product():
    weight, gradient = torch.full((8, 4), 1e-3).half(), torch.full((8, 4), 1e-6).half()
    assert column_products([gradient], [weight], 1).min() > 7e-9
    assert column_products([gradient] * 2, [weight] * 2, 1).min() > 7e-9


def test_large_kernels_are_summed_in_chunks():
    torch.manual_seed(0)
    weight, gradient = torch.randn(700, 100, 3, 3), torch.randn(700, 100, 3, 3)
    torch.testing.assert_close(
        column_products([gradient], [weight], 1)[0], (weight * gradient).sum((0, 2, 3)), rtol=1e-3, atol=1e-3
    )


@pytest.mark.parametrize("kind", [torch.float32, torch.float64, torch.bfloat16])
def test_large_kernels_give_what_small_ones_give(kind, monkeypatch):
    torch.manual_seed(0)
    weights, gradients = ([torch.randn(40, 9, 3, 3).to(kind) for _ in range(2)] for _ in ("weights", "gradients"))
    expected = torch.stack([(w.double() * g.double()).sum((0, 2, 3)) for w, g in zip(weights, gradients, strict=True)])
    for chunk in (columns.CHUNK, 1000):
        monkeypatch.setattr(columns, "CHUNK", chunk)
        found = column_products(gradients, weights, 1)
        assert found.dtype == torch.promote_types(kind, torch.float32)
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)


def test_a_process_without_rows_of_a_kernel_adds_nothing():
    assert column_products([torch.ones(0, 3, 3, 3)], [torch.ones(0, 3, 3, 3)], 1).tolist() == [[0.0, 0.0, 0.0]]


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_one_value_that_is_not_finite_is_seen(value):
    values = torch.full((5,), 3e38)
    assert columns.all_finite(values) and columns.all_finite(values[:0])
    values[3] = value
    assert not columns.all_finite(values)


@pytest.mark.parametrize("kind", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(("shape", "dim"), [((6, 4, 3, 3), 1), ((6, 4, 3, 3), 0), ((70, 33, 1, 1), 1)])
def test_stacked_kernels_give_each_kernels_own_bits(kind, memory, shape, dim, monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(columns, "CHUNK", 3 * torch.Size(shape).numel())  # seven kernels: three, three and one
    weights, gradients = (
        [torch.randn(shape).to(kind).to(memory_format=memory) for _ in range(7)] for _ in ("weights", "gradients")
    )
    alone = [column_products([g], [w], dim)[0] for g, w in zip(gradients, weights, strict=True)]
    assert torch.equal(column_products(gradients, weights, dim), torch.stack(alone))
    factors = torch.rand(7, shape[dim])
    along = [factor.to(kind).view([-1 if d == dim else 1 for d in range(4)]) for factor in factors]
    expected = [weight * factor for weight, factor in zip(weights, along, strict=True)]
    scale_columns(weights, dim, factors)
    assert all(map(torch.equal, weights, expected))
