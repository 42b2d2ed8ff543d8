"""What a trace took from the example without asking is guarded: other inputs raise."""

import copy
import math
import operator
import random
from collections import OrderedDict

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from rewriters.forwards.guards import ShapeGuardError
from rewriters.outputs import relative_error, run_eval
from tests.rewriters.exactness import TOLERANCE, slim
from tests.rewriters.helpers import Net, conv, mapped


def values(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def slim_and_gated(forward, *args, **members):
    """A slim network whose forward is rewritten, and the network as training left it."""
    model = Net(forward, a=conv(3, 16), b=conv(8, 8), head=conv(8, 4), **members).double().eval()
    slimmed = slim(model, args, share=0.6, seed=1)
    assert "" in slimmed.plan.forwards
    gated = copy.deepcopy(model)
    slimmed.undo_log.undo()
    return gated, model


def agree(slim_model, gated, *args):
    assert relative_error(run_eval(slim_model, args), run_eval(gated, args)) <= TOLERANCE


def halves(m, x):
    first, second = m.a(x).chunk(2, 1)
    return m.head(torch.tanh(first) * m.b(second))


@pytest.mark.parametrize("frames", [
    lambda clip: clip.unbind(1), lambda clip: torch.unbind(clip, dim=1), lambda clip: torch.split(clip, 1, 1),
    lambda clip: list(clip.transpose(0, 1)), lambda clip: [clip[:, i] for i in range(clip.shape[1])],
    lambda clip: list(clip.chunk(9, dim=1)),
])  # fmt: skip
def test_as_many_frames_as_the_example_has(frames):
    def forward(m, clip):
        return sum(halves(m, frame.reshape(-1, *clip.shape[2:])) for frame in frames(clip))

    slim_model, gated = slim_and_gated(forward, values(2, 4, 3, 6, 6))
    agree(slim_model, gated, values(1, 4, 3, 5, 5))
    for other in (3, 5):
        with pytest.raises(ShapeGuardError, match=r"test_guards:\d+ \(.* was 4, which now is"):
            slim_model(values(2, other, 3, 6, 6))


@pytest.mark.parametrize("of", [list, tuple, lambda xs: {str(i): x for i, x in enumerate(xs)}])
def test_as_many_entries_as_the_example_has(of):
    def forward(m, xs):
        return sum(halves(m, x) for x in (xs.values() if isinstance(xs, dict) else xs))

    xs = [values(2, 3, 4, 4), 2 * values(2, 3, 4, 4), 3 * values(2, 3, 4, 4)]
    slim_model, gated = slim_and_gated(forward, of(xs[:2]))
    agree(slim_model, gated, of(xs[1:]))
    with pytest.raises(ShapeGuardError, match=r"number of entries of args\[0\] was 2, which now is 3"):
        slim_model(of(xs))


def test_as_many_arguments_as_the_example_has():
    slim_model, gated = slim_and_gated(lambda m, *xs: sum(halves(m, x) for x in xs), *2 * [values(2, 3, 4, 4)])
    agree(slim_model, gated, *2 * [values(1, 3, 6, 6)])
    with pytest.raises(ShapeGuardError, match="number of entries"):
        slim_model(*3 * [values(2, 3, 4, 4)])


def test_a_shape_of_as_many_dimensions_as_the_example_has():
    def forward(m, x):
        batch, *_, width = x.shape
        return halves(m, x.reshape(batch, 3, -1, width))

    slim_model, gated = slim_and_gated(forward, values(2, 3, 4, 4))
    agree(slim_model, gated, values(1, 3, 6, 6))
    with pytest.raises(ShapeGuardError, match="was 4, which now is 5"):
        slim_model(values(2, 3, 2, 4, 4))


def test_the_parts_of_channels_need_no_guard():
    slim_model, _ = slim_and_gated(halves, values(2, 3, 4, 4))
    # the numbers of *args and **kwargs, and whether the first is there
    assert slim_model.forward.source(False).count("guard(") == 3


class Causal(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.o = nn.Linear(8, 24), nn.Linear(8, 5)

    def forward(self, x, mask=None):
        batch, tokens, width = x.shape
        q, k, v = self.qkv(x).view(batch, tokens, 3, 4, 2).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        return self.o(y.transpose(1, 2).reshape(batch, tokens, width))


@pytest.mark.parametrize("given", [True, False])
def test_an_argument_that_was_given_or_not(given):
    x, mask = values(2, 5, 8), torch.ones(5, 5, dtype=torch.bool).tril()
    args, others = ((x, mask), (x,)) if given else ((x,), (x, mask))
    slimmed = slim(Causal().double().eval(), args, share=0.5, seed=1)
    assert slimmed.plan.forwards and slimmed.error <= TOLERANCE
    with pytest.raises(ShapeGuardError):
        slimmed.model(*others)


class Required(Causal):
    def forward(self, x, mask):
        return super().forward(x, mask)


class InContainer(Causal):
    def forward(self, x, more):
        return super().forward(x, more["mask"] if isinstance(more, dict) else more[-1])


@pytest.mark.parametrize(
    ("kind", "given", "left_out"),
    [
        (Required, lambda mask: mask, None),
        (InContainer, lambda mask: {"mask": mask}, {"mask": None}),
        (InContainer, lambda mask: [1, mask], [1, None]),
        (InContainer, lambda mask: OrderedDict(mask=mask), OrderedDict(mask=None)),
    ],
    ids=["required", "dict", "list", "OrderedDict"],
)
def test_a_tensor_that_was_there_and_is_none_later(kind, given, left_out):
    """Attention without its mask would look ahead, and no shape would tell."""
    x, mask = values(2, 5, 8), torch.ones(5, 5, dtype=torch.bool).tril()
    slimmed = slim(kind().double().eval(), (x, given(mask)), share=0.5, seed=1)
    assert slimmed.plan.forwards and slimmed.error <= TOLERANCE
    with pytest.raises(ShapeGuardError, match=r"whether the argument (mask|more\[.*\]) is None"):
        slimmed.model(x, left_out)


@pytest.mark.parametrize("number", [torch.float64, torch.bool])
def test_identity_of_a_dtype(number):
    def forward(m, x, mask):
        first, second = m.a(x).chunk(2, 1)
        kept = second.masked_fill(mask, 0) if mask.dtype is torch.bool else second * mask
        return m.head(torch.tanh(first) * m.b(kept))

    x, mask = values(2, 3, 4, 4), torch.arange(4) > 1
    slim_model, gated = slim_and_gated(forward, x, mask.to(number))
    agree(slim_model, gated, values(1, 3, 4, 4), ~mask.to(number) if number is torch.bool else mask.to(number))
    with pytest.raises(ShapeGuardError, match=r"mask\.dtype is torch\.bool"):
        slim_model(x, mask.to(torch.float64 if number is torch.bool else torch.bool))


def test_a_dtype_that_is_only_passed_on_may_change():
    def forward(m, x):
        first, second = m.a(x).chunk(2, 1)
        return m.head(torch.tanh(first) * m.b(second.to(first.dtype)))

    slim_model, gated = slim_and_gated(forward, values(2, 3, 4, 4))
    agree(slim_model.float(), gated.float(), values(2, 3, 4, 4).float())


random_of_python = random.random


@pytest.mark.parametrize("draw", [random.random, random_of_python, lambda: random.gauss(0, 1), np.random.rand])
@pytest.mark.parametrize("always", [False, True])
def test_channels_stay_where_random_numbers_are_drawn_past_torch(draw, always):
    def forward(m, x):
        first, second = m.a(x).chunk(2, 1)
        return m.head(torch.tanh(first) * m.b(second) * (draw() if always or m.training else 1.0))

    layers = {"a": conv(3, 16), "b": conv(8, 8), "head": conv(8, 4)}
    channel_map = mapped(forward, values(2, 3, 4, 4).float(), **layers)
    assert channel_map.size == 0
    assert any("random numbers" in pin.reason for pin in channel_map.pins)
    assert mapped(halves, values(2, 3, 4, 4).float(), **layers).size == 16


def test_a_flag_is_named():
    def forward(m, x, negated):
        first, second = m.a(x).chunk(2, 1)
        return m.head((-first if negated else torch.tanh(first)) * m.b(second))

    slim_model, _ = slim_and_gated(forward, values(2, 3, 4, 4), True)
    with pytest.raises(ShapeGuardError, match=r"where args\[1\] was True, which now is False"):
        slim_model(values(2, 3, 4, 4), False)


class Defaults(Net):
    def forward(self, x, factor=np.float64(2)):  # noqa: B008  # a number
        return self.function(self, x) * factor


@pytest.mark.parametrize("scaled", [
    lambda y: y / np.sqrt(8), lambda y: y * np.float32(0.3), lambda y: y.reshape(y.shape[0], np.int64(1), *y.shape[1:]),
    lambda y: -y if np.bool_(True) else y,
])  # fmt: skip
def test_numbers_of_numpy(scaled):
    def forward(m, x):
        first, second = m.a(x).chunk(2, 1)
        return m.head(torch.tanh(first) * m.b(scaled(second).reshape(second.shape)))

    model = Defaults(forward, a=conv(3, 16), b=conv(8, 8), head=conv(8, 4)).double().eval()
    slimmed = slim(model, (values(2, 3, 4, 4),), share=0.6, seed=1)
    assert "" in slimmed.plan.forwards and slimmed.error <= TOLERANCE
    assert torch.equal(run_eval(copy.deepcopy(model), (values(2, 3, 4, 4),))[0], slimmed.got[0])
    other = (values(1, 3, 6, 6), 3.0)
    got = run_eval(model, other)
    slimmed.undo_log.undo()
    assert relative_error(got, run_eval(model, other)) <= TOLERANCE


@pytest.mark.parametrize("factor", [
    lambda y: y.shape[1] * y.shape[2] * y.shape[3], lambda y: y.numel(), lambda y: (y.shape[1] * y.size(2)) ** -0.5,
    lambda y: math.sqrt(y.shape[0] * y.shape[1]), lambda y: y.size(1), lambda y: y.shape[1] / y.shape[2],
    lambda y: math.prod(y.shape[1:]), lambda y: np.prod(y.shape[1:]), lambda y: math.prod(y.size()),
    lambda y: operator.mul(*y.shape[1:3]),
])  # fmt: skip
def test_only_the_channels_in_a_factor_are_a_constant(factor):
    def forward(m, x):
        first, second = m.a(x).chunk(2, 1)
        return m.head(torch.tanh(first) * m.b(second) * 50 / factor(second))

    slim_model, gated = slim_and_gated(forward, values(2, 3, 4, 4))
    agree(slim_model, gated, values(2, 3, 4, 4))
    agree(slim_model, gated, values(3, 3, 6, 5))


@pytest.mark.parametrize("number", [int, float])
def test_a_factor_of_channels_and_other_sizes_that_is_a_plain_number_is_guarded(number):
    def forward(m, x):
        first, second = m.a(x).chunk(2, 1)
        return m.head(torch.tanh(first) * m.b(second) * 50 / number(np.prod(second.shape[1:])))

    slim_model, gated = slim_and_gated(forward, values(2, 3, 4, 4))
    agree(slim_model, gated, values(3, 3, 4, 4))
    with pytest.raises(ShapeGuardError, match=r"test_guards.*number\(np\.prod.* was 128.*, which now is 288"):
        run_eval(slim_model, (values(2, 3, 6, 6),))


def test_a_mask_of_bools_in_a_rewritten_attention():
    def forward(m, x, padding):
        y = m.embed(x)
        return m.head(m.attention(y, y, y, key_padding_mask=padding, need_weights=False)[0])

    layers = {"embed": nn.Linear(6, 16), "attention": nn.MultiheadAttention(16, 4, batch_first=True)}
    model = Net(forward, **layers, head=nn.Linear(16, 3)).double().eval()
    args = (values(2, 5, 6), torch.arange(5) > torch.tensor([[4], [2]]))
    slimmed = slim(model, args, share=0.5, seed=1)
    assert "attention" in slimmed.plan.forwards and slimmed.error <= TOLERANCE
    with pytest.raises(ShapeGuardError):
        model(args[0], args[1].double())
