"""The clipped group Lasso: its proximal step, against equation 3 and brute force, and what it does to a network."""

import math

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import autogate
from autogate.digits import load
from autogate.methods.proximal import clipped_threshold
from rewriters import AutogateError
from tests.autogate.gated_nets import ConvNet, train

EXAMPLE = torch.randn(2, 3, 6, 6)


@settings(max_examples=50)
@given(st.floats(0, 3), st.floats(0, 4), st.floats(0.01, 2))
def test_the_threshold_matches_the_brute_force_minimiser(norm, beta, delta):
    points = torch.linspace(0, 3, 60_001, dtype=torch.float64)

    def cost(x: Tensor) -> Tensor:
        return (x - norm) ** 2 / 2 + beta * x.clamp(max=delta)

    found = clipped_threshold(torch.tensor(norm, dtype=torch.float64), beta, delta)
    assert cost(found) <= cost(points).min() + 1e-7


def test_the_threshold_spares_large_norms_and_gives_exact_zeros():
    norm = torch.tensor([0.05, 0.3, 0.9, 2.0])
    assert clipped_threshold(norm, 0.1, 0.5).tolist() == pytest.approx([0.0, 0.2, 0.9, 2.0])
    assert clipped_threshold(norm, 0.1, math.inf).tolist() == pytest.approx([0.0, 0.2, 0.8, 1.9])


def with_unequal_classes() -> ConvNet:
    torch.manual_seed(0)
    net = ConvNet()
    with torch.no_grad():
        for conv in (net.conv1, net.conv2, net.conv3):
            conv.weight *= torch.linspace(0.2, 3, len(conv.weight)).view(-1, 1, 1, 1)
    return net


def penalty(net: ConvNet, a: float) -> Tensor:
    """The sum of equation 3, written out for a plain network."""
    total = torch.zeros(())
    for layer, after in ((1, net.conv2.weight), (2, net.conv3.weight), (3, net.fc.weight)):
        conv, norm = getattr(net, f"conv{layer}"), getattr(net, f"norm{layer}")
        parts = [conv.weight.flatten(1), conv.bias[:, None], norm.weight[:, None], norm.bias[:, None]]
        norms = torch.cat([*parts, after.transpose(0, 1).flatten(1)], 1).norm(dim=1)
        total = total + torch.minimum(norms, a * norms.mean().detach()).sum()
    return total


@pytest.mark.parametrize("a", [0.9, math.inf])
def test_a_step_is_that_of_equation_3(a):
    """With a fixed lambda the weights move by the penalty's gradient, to first order in lambda."""
    net = with_unequal_classes()
    lam, lr = 0.2, 0.1
    wanted = torch.autograd.grad(penalty(net, a), [p for p in net.parameters() if p is not net.fc.bias])
    autogate.prepare(net, EXAMPLE, method=autogate.ClippedLasso(a=a, lam=lam), steps=100)
    before = [p.detach().clone() for p in net.parameters() if p is not net.fc.bias]
    optimizer = torch.optim.SGD(net.parameters(), lr)
    for parameter in net.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    after = [p.detach() for p in net.parameters() if p is not net.fc.bias]
    moved = torch.cat([((old - new) / (lam * lr)).flatten() for old, new in zip(before, after, strict=True)])
    expected = torch.cat([part.flatten() for part in wanted])
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(moved, expected, rtol=0.03, atol=3e-3)
    assert float(autogate.gates(net).balance) == pytest.approx(lam)


def test_a_class_that_reaches_zero_is_zero_everywhere_and_stays_so():
    net = ConvNet()
    with torch.no_grad():
        for tensor in (net.conv1.weight, net.conv1.bias, net.norm1.weight, net.norm1.bias):
            tensor[3] = 0
        net.conv2.weight[:, 3] = 1e-6
    autogate.prepare(net, EXAMPLE, method=autogate.ClippedLasso(lam=0.01), steps=100)
    train(net, torch.optim.SGD(net.parameters(), 0.1, momentum=0.9), 3)
    bank = autogate.gates(net)
    assert not bank.live[3] and bank.live.sum() > 40
    assert net.conv2.weight[:, 3].abs().max() == 0 == net.norm1.weight[3] == net.conv1.weight[3].abs().max()
    slim = autogate.finalize(net, warn=False)
    assert slim.conv1.out_channels == int(bank.live[:16].sum()) < 16


def test_norms_spread_further_than_the_plain_group_lassos():
    """As in figure 10: classes above the threshold aren't held down with the others."""
    spread = {}
    for a in (0.9, math.inf):
        method = autogate.ClippedLasso(a=a, lam=0.5)
        net = autogate.prepare(with_unequal_classes(), EXAMPLE, steps=100, method=method)
        optimizer = torch.optim.SGD(net.parameters(), 0.1)
        bank = autogate.gates(net)
        for _step in range(15):
            for parameter in net.parameters():
                parameter.grad = torch.zeros_like(parameter)
            optimizer.step()
        norms = bank.norm[16:40]
        spread[a] = float(norms.std() / norms.mean())
    assert spread[0.9] > 1.1 * spread[math.inf]


def test_a_budget_and_a_fixed_lambda_contradict_each_other():
    net = ConvNet()
    with pytest.raises(AutogateError, match=r"ClippedLasso\(lam=0\.01\) has a fixed lambda, which reaches no budget"):
        autogate.prepare(net, EXAMPLE, flops=0.5, method=autogate.ClippedLasso(lam=0.01))
    with pytest.raises(AutogateError, match="a fixed lambda can't be held to the most"):
        autogate.prepare(net, EXAMPLE, limits={"conv1": (0.1, 0.5)}, method=autogate.ClippedLasso(lam=0.01))
    with pytest.raises(AutogateError, match=r"a is 0; it must be positive"):
        autogate.ClippedLasso(a=0)
    assert not hasattr(net, "autogate")


def test_steps_without_a_learning_rate_do_not_count():
    """torch.distributed.checkpoint takes one to create an optimizer's state."""
    net = autogate.prepare(ConvNet(), EXAMPLE, steps=50, method=autogate.ClippedLasso())
    before = [weight.detach().clone() for weight in autogate.gates(net).kernels()]
    autogate.gates(net).step(0.0)
    assert autogate.gates(net).progress().step == 0
    assert all(torch.equal(old, new) for old, new in zip(before, autogate.gates(net).kernels(), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("a", [0.3, 0.75, 1.5, math.inf])
@pytest.mark.parametrize("flops", [0.5, 0.22, 0.05])
def test_budgets_are_met_on_digits(a, flops):
    torch.manual_seed(0)
    images, labels = load()[0].images, load()[0].labels
    model = timm.create_model("test_resnet", num_classes=10, in_chans=images.shape[1])
    model = autogate.prepare(model, images[:2], flops=flops, steps=120, method=autogate.ClippedLasso(a=a))
    optimizer = torch.optim.SGD(model.parameters(), 0.02, momentum=0.9)
    for step in range(120):
        chosen = torch.randint(len(images), (32,), generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images[chosen]), labels[chosen]).backward()
        optimizer.step()
    assert autogate.gates(model).progress().settled
    assert abs(autogate.gates(model).shares()["FLOPs"] - flops) <= 0.01
    autogate.finalize(model)
