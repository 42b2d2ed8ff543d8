"""Finalize compares outputs, and knows float32's rounding from other differences."""

import copy

import pytest
import torch
from torch import nn

import autogate
from autogate.slim import finalizing
from rewriters.outputs import relative_error
from tests.autogate.loops.small_nets import EXAMPLE as IMAGES
from tests.autogate.loops.small_nets import Residual

EXAMPLE = torch.linspace(-1, 1, 32).view(4, 8)


class Magnifying(nn.Module):
    """Rounding errors of its layers come out ten thousand times as large.

    Its norm sees to it that there are some: over live channels it is computed in another way than over all there are.
    A product with zeros in it may round like the one without.
    """

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.second = nn.Linear(8, 64), nn.LayerNorm(64), nn.Linear(64, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (1e4 * self.second(self.norm(self.first(x)).relu())).sin()


def prepared() -> nn.Module:
    model = autogate.prepare(Magnifying(), EXAMPLE, flops=1.0)
    with torch.no_grad():
        autogate.gates(model).alpha[::2] = 0
    return model


def test_rounding_is_no_reason_to_refuse(monkeypatch):
    model = prepared()
    with monkeypatch.context() as patch, pytest.raises(autogate.VerificationError, match="more than 1e-05"):
        patch.setattr(finalizing, "EXACT_IN_FLOAT64", -1.0)
        autogate.finalize(model, warn=False)
    slim = autogate.finalize(model, warn=False)
    assert slim is model and not hasattr(slim, "autogate") and not slim._forward_pre_hooks
    assert slim.first.out_features == 32 and slim.first.weight.dtype == torch.float32


def test_a_difference_that_float64_has_too_is_refused(monkeypatch):
    def carry_out_wrongly(model, *args, **more):
        slim_and_record(model, *args, **more)
        args[-1].set_attribute(model, "second", nn.Linear(32, 8, dtype=model.first.weight.dtype))

    model, slim_and_record = prepared(), finalizing.slim_and_record
    gated = model(EXAMPLE)
    with monkeypatch.context() as patch, pytest.raises(autogate.VerificationError):
        patch.setattr(finalizing, "slim_and_record", carry_out_wrongly)
        autogate.finalize(model, warn=False)
    assert torch.equal(model(EXAMPLE), gated) and autogate.gates(model).channel_map.size == 64
    autogate.finalize(model, warn=False)


def test_a_model_that_runs_in_float32_only_is_refused():
    class Single(Magnifying):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x.float())

    model = autogate.prepare(Single(), EXAMPLE, flops=1.0)
    with torch.no_grad():
        autogate.gates(model).alpha[::2] = 0
    with pytest.raises(autogate.VerificationError):
        autogate.finalize(model, warn=False)
    assert autogate.gates(model).follows


@pytest.mark.parametrize("cast", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("given", [False, True])
def test_a_model_that_was_cast_since_it_was_prepared(cast, given):
    model = autogate.prepare(Residual(), IMAGES, flops=1.0)
    with torch.no_grad():
        autogate.gates(model).alpha[::3] = 0
    gated = model.to(cast).eval()(IMAGES.to(cast))
    slim = autogate.finalize(model, IMAGES.to(cast) if given else None, warn=False)
    assert slim.head.in_features < 16 and slim.head.weight.dtype == cast
    torch.testing.assert_close(slim(IMAGES.to(cast)), gated, rtol=0.1, atol=0.1)


class Detector(nn.Module):
    """Keeps anchors for the size that it saw last; its strides are a tensor that is no buffer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 6, 1)
        self.strides, self.shape, self.anchors = torch.tensor([2.0, 4.0]), None, None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.second(self.first(x).relu())
        if self.shape != y.shape:
            levels = [y.new_full((3, *y.shape[2:]), self.strides[level]) for level in range(2)]
            self.shape, self.anchors = y.shape, torch.cat(levels)
        return y * self.anchors


def test_a_model_that_keeps_anchors_is_the_same_before_and_after_it_ran():
    model = autogate.prepare(Detector(), torch.randn(2, 3, 8, 8), flops=0.5)
    assert model.shape is None and autogate.summary(model).progress.classes == 8
    with torch.no_grad():
        autogate.gates(model).alpha[::2] = 0
        larger = torch.randn(2, 3, 16, 12)
        wanted = model.eval()(larger)
        slim = autogate.finalize(model, warn=False)
        assert slim.first.out_channels == 4
        assert (slim(larger) - wanted).abs().max() <= 1e-5 * wanted.abs().max()


class RoundingAlone(nn.Module):
    """Some of its outputs are zero but for rounding."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.GroupNorm(1, 16)  # over live channels it rounds otherwise
        self.first, self.second, self.third = nn.Conv2d(3, 16, 1), nn.Conv2d(16, 6, 3), nn.Conv2d(16, 2, 1)

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        y = self.second(self.norm(self.first(x)).relu())
        normed = nn.functional.instance_norm(y)
        return [torch.cat([y, -y], 1).mean(), normed.mean((2, 3)), self.third(self.first(x))[:, 1]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_outputs_that_are_rounding_alone_are_no_reason_to_refuse(dtype, monkeypatch):
    def carry_out_wrongly(model, *args, **more):
        done = slim_and_record(model, *args, **more)
        with torch.no_grad():
            model.third.weight.mul_(1.001)
        return done

    images = torch.randn(2, 3, 9, 9, generator=torch.Generator().manual_seed(0)).to(dtype)
    model = autogate.prepare(RoundingAlone().to(dtype), images, flops=1.0)
    with torch.no_grad():
        autogate.gates(model).alpha[::3] = 0
    slim_and_record = finalizing.slim_and_record
    with monkeypatch.context() as patch, pytest.raises(autogate.VerificationError):
        patch.setattr(finalizing, "slim_and_record", carry_out_wrongly)
        autogate.finalize(model, warn=False)
    assert autogate.finalize(model, warn=False).first.out_channels < 16


class GraphNet(nn.Module):
    """Two graph convolutions (Kipf and Welling, equation 2)."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Linear(3, 16), nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, nodes, edges):
        hidden = torch.spmm(edges, self.a(nodes)).relu()
        return self.head((edges @ self.b(hidden)).relu())


def test_a_graph_given_as_a_sparse_matrix():
    torch.manual_seed(0)
    model, nodes, edges = GraphNet().eval(), torch.randn(10, 3), torch.rand(10, 10).round().to_sparse()
    autogate.prepare(model, (nodes, edges), flops=0.5)
    autogate.close(model, by="l1")
    gated = copy.deepcopy(model)
    autogate.finalize(model)
    assert model.a.out_features < 16
    fewer = torch.rand(7, 7).round().to_sparse()
    assert relative_error([model(nodes[:7], fewer)], [gated(nodes[:7], fewer)]) < 1e-5
