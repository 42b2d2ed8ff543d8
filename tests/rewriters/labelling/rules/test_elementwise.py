"""Elementwise ops couple the channels that meet."""

import operator

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import autogate
from benchmarks.parts import finalize_compared, kill
from rewriters.labelling.channel_map import ALWAYS, Side
from tests.rewriters.exactness import assert_exact
from tests.rewriters.helpers import Net, classes, conv, image, is_pinned, mapped, reasons


def two_into_one(combine):
    """Two convolutions whose outputs are combined and convolved again."""
    return mapped(lambda m, x: m.last(combine(m.a(x), m.b(x))), a=conv(3, 4), b=conv(3, 4), last=conv(4, 2))


@pytest.mark.parametrize(
    "combine",
    [operator.add, operator.mul, operator.iadd, torch.maximum, torch.minimum, lambda a, b: a * b.sigmoid(),
     lambda a, b: torch.where(a > 0, a, b), lambda a, b: torch.lerp(a, b, 0.5), lambda a, b: torch.addcmul(a, a, b),
     lambda a, b: a.copy_(b), lambda a, b: torch.stack([a, b]).sum(0)],
)  # fmt: skip
def test_residual_add_and_its_kin_couple_channels(combine):
    found = two_into_one(combine)
    assert classes(found, "a.weight", 0) == classes(found, "b.weight", 0) == classes(found, "last.weight", 1)
    assert classes(found, "a.weight", 0) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    "act",
    [F.relu, F.silu, F.gelu, F.mish, F.hardswish, F.elu, F.softplus, torch.tanh, torch.exp, torch.abs, F.relu6,
     F.logsigmoid, F.hardsigmoid, F.leaky_relu, F.selu, F.celu, F.softsign, F.hardshrink, F.softshrink, F.tanhshrink,
     lambda x: x.clamp(-1, 1), lambda x: x**2, lambda x: x.masked_fill(x > 1, 0.0), lambda x: F.dropout(x, 0.1, True),
     lambda x: F.dropout2d(x, 0.1, True), lambda x: F.alpha_dropout(x, 0.1, True), lambda x: x.float().half().float(),
     lambda x: x.contiguous().clone().detach(), lambda x: F.threshold(x, 0.1, 0.0), lambda x: torch.zeros_like(x) + x,
     F.rrelu, F.rrelu_, lambda x: F.rrelu(x, training=True),
     lambda x: torch.fake_quantize_per_tensor_affine(x, 0.1, 0, -128, 127),
     lambda x: torch.fake_quantize_per_tensor_affine(x, torch.ones(1), torch.zeros(1, dtype=torch.int), -128, 127)],
)  # fmt: skip
def test_activations_pass_channels(act):
    found = mapped(lambda m, x: m.b(act(m.a(x))), a=conv(3, 4), b=conv(4, 2))
    assert classes(found, "a.weight", 0) == classes(found, "b.weight", 1) == [0, 1, 2, 3]


def test_prelu_parameters_ride_along():
    found = mapped(lambda m, x: m.b(m.act(m.a(x))), a=conv(3, 4), act=nn.PReLU(4), b=conv(4, 2))
    assert classes(found, "act.weight", 0) == classes(found, "a.weight", 0) == [0, 1, 2, 3]


def test_layer_scale_rides_along():
    found = mapped(
        lambda m, x: m.b(m.a(x) * m.gamma), a=conv(3, 4), gamma=nn.Parameter(torch.ones(4, 1, 1)), b=conv(4, 2)
    )
    assert classes(found, "gamma", 0) == [0, 1, 2, 3]


def test_squeeze_excite_couples_through_broadcasting():
    found = mapped(
        lambda m, x: m.b((y := m.a(x)) * m.fc(y.mean((2, 3), keepdim=True))), a=conv(3, 4), fc=conv(4, 4), b=conv(4, 2)
    )
    assert classes(found, "fc.weight", 0) == classes(found, "fc.weight", 1) == classes(found, "a.weight", 0)


def test_one_channel_broadcasts_without_coupling():
    found = mapped(lambda m, x: m.b(m.a(x) * m.one(x)), a=conv(3, 4), one=conv(3, 1), b=conv(4, 2))
    assert classes(found, "a.weight", 0) == [0, 1, 2, 3]


def test_meeting_the_input_pins():
    found = mapped(lambda m, x: m.b(m.a(x) + x), a=conv(3, 3), b=conv(3, 2))
    assert is_pinned(found, "a.weight", 0)
    assert any("meets a tensor whose channels no layer owns" in reason for reason in reasons(found, "a.weight", 0))


def test_different_numbers_for_channels_pin_and_one_number_does_not():
    found = mapped(lambda m, x: m.b(m.a(x) + torch.arange(4.0).view(4, 1, 1)), a=conv(3, 4), b=conv(4, 2))
    assert is_pinned(found, "a.weight", 0)
    found = mapped(lambda m, x: m.b(m.a(x) * torch.ones(1, 4, 1, 1)), a=conv(3, 4), b=conv(4, 2))
    assert not is_pinned(found, "a.weight", 0)


def test_in_place_add_onto_a_slice_couples_that_slice_only():
    def forward(m, x):
        y = m.a(x)
        y[:, :2] += m.b(x)
        return m.c(y)

    found = mapped(forward, a=conv(3, 4), b=conv(3, 2), c=conv(4, 2))
    assert classes(found, "a.weight", 0) == [0, 1, 2, 3]
    assert classes(found, "b.weight", 0) == [0, 1]


def test_outputs_pin_what_the_model_returns():
    found = mapped(lambda m, x: m.a(x), a=conv(3, 4))
    assert reasons(found, "a.weight", 0) == ["output: the model returns it"]
    assert found.size == 0
    assert classes(found, "a.weight", 0) == [ALWAYS] * 4


def test_the_halves_of_a_gated_linear_unit_go_two_by_two():
    model = Net(lambda m, x: m.b(F.glu(m.a(x), 1)), a=conv(3, 8), b=conv(4, 2))
    channel_map = assert_exact(model.double(), (image().double(),)).analysis.channel_map
    assert classes(channel_map, "a.weight", 0) == [0, 1, 2, 3, 0, 1, 2, 3]
    assert classes(channel_map, "b.weight", 1) == [0, 1, 2, 3]
    along_positions = mapped(lambda m, x: m.b(F.glu(m.a(x), -1)), image(), a=conv(3, 8), b=conv(8, 2))
    assert classes(along_positions, "a.weight", 0) == [*range(8)]


def test_an_op_nobody_described_pins_and_says_so():
    found = mapped(lambda m, x: m.b(torch.linalg.matrix_exp(m.a(x))), image(), a=conv(3, 4), b=conv(4, 2))
    assert is_pinned(found, "a.weight", 0)
    assert reasons(found, "a.weight", 0) == ["aten.linalg_matrix_exp.default: no rule describes this op"]


class Odd(nn.Module):
    """Ends in an op that no rule describes."""

    def __init__(self):
        super().__init__()
        self.c = conv(16, 16)

    def forward(self, x):
        return torch.linalg.matrix_exp(self.c(x))


def test_an_op_without_a_rule_pins_its_borders_only():
    torch.manual_seed(0)
    model = nn.Sequential(conv(3, 32), nn.ReLU(), conv(32, 16), Odd(), conv(16, 32), conv(32, 4))
    summary = autogate.summary(autogate.prepare(model, image(), flops=1.0))
    (pin,) = (pin for pin in summary.pins if pin.reason == "no rule describes this op")
    assert (pin.module, pin.op) == ("3", "aten.linalg_matrix_exp.default")
    assert set(pin.sides) == {Side("3.c.weight", 0), Side("3.c.bias", 0)}
    assert summary.progress.classes == 32 + 16 + 32
    assert "matrix_exp" in str(summary)
    kill(model, 0.5)
    assert finalize_compared(model, ((image(),), {})) <= 1e-6
    assert model[2].out_channels < 16
    assert model[3].c.out_channels == model[4].in_channels == 16
