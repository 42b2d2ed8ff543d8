"""Forwards with autograd functions, checkpoints, and calls that take tensors and no proxies."""

from __future__ import annotations

import copy
import functools
import pickle

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from tests.rewriters.exactness import assert_exact, slim
from tests.rewriters.helpers import Net, conv, image, reasons


class Rounded(torch.autograd.Function):
    """Rounds to quarters, and hands gradients on as if it hadn't."""

    @staticmethod
    def forward(ctx, x):
        return (x * 4).round() / 4

    @staticmethod
    def backward(ctx, gradient):
        return gradient


class SetUpApart(Rounded):
    @staticmethod
    def forward(x, scale):
        return (x * scale).round() / scale, x.sign()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx, gradient, _):
        return gradient, None


class Centred(torch.autograd.Function):
    """Takes a mean over channels, which are all there is to it."""

    @staticmethod
    def forward(ctx, x):
        return x - x.mean(1, keepdim=True)

    @staticmethod
    def backward(ctx, gradient):
        return gradient - gradient.mean(1, keepdim=True)


def rows(y):
    """A size is held here: the forward is traced."""
    return y.reshape(len(y), 8, -1).view(y.shape)


def between(forward, **members):
    members = {"a": conv(3, 8), "b": conv(8, 2), **members}
    return Net(lambda m, x: m.b(forward(m, m.a(x))), **members).double().eval()


@pytest.mark.parametrize(
    "forward",
    [
        lambda m, y: Rounded.apply(rows(y)),
        lambda m, y: SetUpApart.apply(rows(y), 4.0)[0],
        lambda m, y: torch.add(*SetUpApart.apply(rows(y), 4.0)),
    ],
    ids=["one", "several, first", "several, all"],
)
def test_backwards_of_their_own_stay(forward):
    example = (image().double(),)
    slimmed = assert_exact(between(forward), example)
    assert slimmed.analysis.channel_map.size == 8
    slimmed = slim(between(forward), example, share=0.6, seed=1)
    assert slimmed.plan.forwards
    for model in (slimmed.model, copy.deepcopy(slimmed.model)):
        model.zero_grad()
        model(*example).sum().backward()
        assert model.a.weight.grad.abs().sum() > 0  # rounding itself has a gradient of zero


class Reversed(torch.autograd.Function):
    """Passes on what it is given, and turns gradients round."""

    @staticmethod
    def forward(ctx, x, scale=1.0):
        return x * scale

    @staticmethod
    def backward(ctx, gradient):
        return -gradient, None


class ReversedApart(torch.autograd.Function):
    @staticmethod
    def forward(x, scale=1.0):
        return x * scale, x.sign()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx, gradient, _):
        return -gradient, None


reverse, reverse_apart = Reversed.apply, ReversedApart.apply
KEPT = {"reverse": reverse, "all": [reverse]}


def reversed_rows(y, scale):
    return reverse(rows(y), scale)


@pytest.mark.parametrize(
    "forward",
    [
        lambda m, y: reverse(rows(y)),
        lambda m, y: reverse_apart(rows(y), 1.0)[0],
        lambda m, y: reverse_apart(rows(y))[0],
        lambda m, y: functools.partial(Reversed.apply, rows(y))(1.0),
        lambda m, y: KEPT["reverse"](rows(y)),
        lambda m, y: KEPT["all"][0](rows(y)),
        lambda m, y: m.kept(rows(y)),
        lambda m, y: reversed_rows(y, 1.0),
        lambda m, y: reverse(rows(y)) * len(reverse_apart(m.one)[0]),
    ],
    ids=["name", "set up apart", "default", "partial", "dict", "list", "attribute", "helper", "no proxy"],
)
def test_a_bound_apply_keeps_its_backward(forward):
    example = (image().double(),)

    def made():
        model = between(forward)
        model.kept, model.one = reverse, torch.ones(1, dtype=torch.double, requires_grad=True)
        return model

    slimmed = slim(made(), example, share=0.6, seed=1)
    assert slimmed.plan.forwards and slimmed.error == 0
    for model in (slimmed.model, copy.deepcopy(slimmed.model)):
        for other in (example[0], torch.cat([example[0]] * 3)[:, :, :5]):
            x = other.clone().requires_grad_()
            model.train()(x).sum().backward()
            convolved = model.b(model.a(x))
            assert torch.allclose(x.grad, -torch.autograd.grad(convolved.sum(), x)[0])


def test_functions_are_as_before_once_a_forward_was_traced():
    before = dict(vars(type(Reversed)))
    slim(between(lambda m, y: reverse(rows(y))), (image().double(),))
    assert dict(vars(type(Reversed))) == before
    x = torch.ones(2, requires_grad=True)
    y, _ = reverse_apart(x, 3.0)
    y.sum().backward()
    assert torch.equal(x.grad, -torch.ones(2))


def test_a_forward_with_a_backward_of_its_own_is_pickled():
    model = nn.Sequential(conv(3, 8), Rows(), conv(8, 2)).double().eval()
    slimmed = slim(model, (image().double(),), share=0.6, seed=1)
    assert "1" in slimmed.plan.forwards
    x = image().double()
    assert torch.equal(pickle.loads(pickle.dumps(slimmed.model))(x), slimmed.model(x))


class Rows(nn.Module):
    def forward(self, y):
        return Rounded.apply(rows(y))


def test_a_statistic_in_a_forward_with_a_backward_of_its_own_pins():
    model = between(lambda m, y: Centred.apply(rows(y)))
    assert assert_exact(model, (image().double(),)).analysis.channel_map.size == 0


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("reentrant", [False, True])
def test_what_is_checkpointed_is_followed(reentrant):
    def forward(m, y):
        return checkpoint(lambda y, z: rows(m.inner(y)) + z, y, y, use_reentrant=reentrant)

    slimmed = assert_exact(between(forward, inner=conv(8, 8)), (image().double(),))
    assert slimmed.analysis.channel_map.size == 8
    assert "" in slimmed.plan.forwards


def test_what_takes_tensors_and_no_proxies_pins_and_says_so():
    """PyTorch's C++ must not take a proxy for the tensor that it stands for."""
    model = between(lambda m, y: torch.vmap(doubled)(rows(y)))
    found = assert_exact(model, (image().double(),)).analysis.channel_map
    assert found.size == 0
    assert any("torch.fx cannot trace it" in reason for reason in reasons(found, "a.weight", 0))


def doubled(x: torch.Tensor) -> torch.Tensor:
    return x * 2


def test_a_proxy_is_an_instance_of_what_it_stands_for():
    def forward(m, y):
        assert isinstance(y, torch.Tensor) and not isinstance(y, nn.Parameter) and not isinstance(y, (int, str))
        assert isinstance(y.shape, tuple) and isinstance(y.shape[1], int) and isinstance(m.scale, nn.Parameter)
        return rows(y) * m.scale

    slimmed = assert_exact(between(forward, scale=nn.Parameter(torch.rand(8, 1, 1))), (image().double(),))
    assert slimmed.analysis.channel_map.size == 8 and "" in slimmed.plan.forwards
    assert isinstance.__module__ == "builtins"
