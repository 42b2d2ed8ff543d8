"""Outputs are compared at the precision of their type, whatever a GPU may round."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

from rewriters import relative_error, rounding_errors, run_eval
from rewriters.outputs import full_precision


class Telling(nn.Module):
    """Notes the precision that it runs with."""

    def forward(self, x: Tensor) -> Tensor:
        self.told = by_operator()
        return x


def by_operator() -> list[str]:
    operators = (torch.backends.cudnn.conv, torch.backends.cudnn.rnn, torch.backends.cuda.matmul)
    return [operator.fp32_precision for operator in operators]


@contextmanager
def settings_kept():
    before, products = by_operator(), torch.get_float32_matmul_precision()
    try:
        yield
    finally:
        torch.backends.cudnn.conv.fp32_precision = torch.backends.cudnn.rnn.fp32_precision = "tf32"
        torch.backends.cudnn.allow_tf32 = True
        torch.set_float32_matmul_precision(products)
        torch.backends.cuda.matmul.fp32_precision = before[2]


@pytest.mark.skipif(not hasattr(torch.backends.cudnn, "conv"), reason="PyTorch can't tell it by operator")
@pytest.mark.parametrize("products", ["highest", "high", "medium"])
@pytest.mark.parametrize("convolutions", ["tf32", "ieee", "mixed"])
def test_outputs_to_compare_are_in_full_precision(convolutions, products):
    model = Telling()
    with settings_kept():
        torch.set_float32_matmul_precision(products)
        if convolutions == "mixed":
            torch.backends.cudnn.conv.fp32_precision = "ieee"  # rnn stays: what the older names can't tell
        else:
            torch.backends.cudnn.allow_tf32 = convolutions == "tf32"
        before = by_operator()
        run_eval(model, (torch.ones(1),))
        assert not {"tf32", "bf16"} & set(model.told)
        assert by_operator() == before
        if convolutions != "mixed":
            assert torch.backends.cudnn.allow_tf32 == (convolutions == "tf32")  # and can still be asked
        assert torch.get_float32_matmul_precision() == products


def test_precision_is_given_back_after_an_error():
    before = by_operator()
    assert "tf32" in before  # as convolutions are by default
    with pytest.raises(ValueError), full_precision():
        raise ValueError
    assert by_operator() == before


def test_what_follows_the_setting_for_all_operators_still_does():
    """ "none" is another thing than "ieee": such an operator follows `torch.backends.fp32_precision`."""
    if not hasattr(torch.backends.cudnn, "conv"):
        pytest.skip("PyTorch can't tell it by operator")
    model = Telling()
    with settings_kept():
        torch.backends.cuda.matmul.fp32_precision = "none"
        run_eval(model, (torch.ones(1),))
        assert by_operator()[2] == "none" and model.told[2] != "tf32"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_output_that_is_rounding_alone_is_told_from_one_that_is_small(dtype):
    class Sums(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = x.exp()
            return torch.cat([y, -y, y * 1e-8], 1).mean(), (torch.cat([y, -y / 3, -y / 3, -y / 3], 1)).mean()

    x = torch.randn(4, 50, generator=torch.Generator().manual_seed(0)).to(dtype)
    got, errors = run_eval(Sums(), (x,)), rounding_errors(Sums(), (x,))
    assert 0 < errors[1] < 1e3 * torch.finfo(dtype).eps and abs(got[1]) <= errors[1]
    wrong = [got[0], got[1] + 100 * errors[1]]
    assert relative_error(wrong, got, errors) > 1
    assert relative_error([got[0], -got[1]], got, errors) == 0
    if dtype == torch.float64:
        assert got[0] > errors[0] and relative_error([got[0] * 1.001, got[1]], got, errors) > 1e-4
