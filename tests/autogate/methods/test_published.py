"""GDP to the letter of section 4.1, and the variants of section 4.3, each against its equation."""

import pytest
import torch
from torch import Tensor, nn

import autogate
from autogate.gating.bank import GateBank
from autogate.methods.gate_function import gate_value
from rewriters import AutogateError, relative_error, run_eval
from tests.autogate.gated_nets import ConvNet, batch, train

EXAMPLE = torch.randn(2, 3, 6, 6)
PUBLISHED = {"lam": 2e-3, "epochs": 5, "steps_per_epoch": 20}


def prepared(method: autogate.GDP, **options) -> tuple[ConvNet, GateBank]:
    torch.manual_seed(0)
    net = autogate.prepare(ConvNet(), EXAMPLE, method=method, **options)
    return net, autogate.gates(net)


def prices(net: ConvNet, bank: GateBank, alive: Tensor) -> Tensor:
    """R's derivative, FLOPs in units of a channel's mean price at the start."""
    resource = bank.targets.targets[0].resource
    return (resource.price(alive.detach().double()) / resource.price(torch.ones(64, dtype=torch.bool)).mean()).float()


def test_the_published_method_prints_as_a_call_that_makes_it():
    method = autogate.GDP.published(**PUBLISHED)
    assert eval(repr(method), {"GDP": autogate.GDP, "inf": float("inf")}) == method
    assert method.run_steps == 100 and prepared(method)[1].schedule.steps == 100


def test_epsilon_falls_by_its_factor_once_an_epoch_to_the_end():
    net, bank = prepared(autogate.GDP.published(**PUBLISHED, epsilon_factor=0.9))
    optimizer = torch.optim.SGD(net.parameters(), 0.01)
    course = []
    for epoch in range(5):
        train(net, optimizer, 20, first=20 * epoch)
        course.append(float(bank.epsilon))
    assert course == pytest.approx([0.1 * 0.9**epoch for epoch in range(1, 6)])


def test_alphas_step_is_equations_8_and_9_with_a_tenth_of_the_rate():
    net, bank = prepared(autogate.GDP.published(lam=0.1, epochs=1, steps_per_epoch=100))
    alpha = torch.ones(64, requires_grad=True)
    twin = ConvNet()
    twin.load_state_dict({name: value for name, value in net.state_dict().items() if "autogate" not in name})
    scale = gate_value(torch.tensor(1.0), 0.1)
    with torch.no_grad():  # W of the paper; the kernels hold W g
        for weight in (twin.conv2.weight, twin.conv3.weight, twin.fc.weight):
            weight /= scale
    lr, (images, labels) = 0.05, batch(0)
    gates = gate_value(alpha, 0.1)
    nn.functional.cross_entropy(twin(images, (gates[:16], gates[16:40], gates[40:])), labels).backward()
    hat = alpha.detach() - 0.1 * lr * alpha.grad
    wanted = hat - 0.1 * lr * 0.1 * prices(net, bank, torch.ones(64))
    kernel = (twin.conv2.weight - lr * twin.conv2.weight.grad) * gate_value(wanted, 0.1)[:16].view(1, -1, 1, 1)
    train(net, torch.optim.SGD(net.parameters(), lr), 1)
    torch.testing.assert_close(bank.alpha, wanted, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(net.conv2.weight, kernel, rtol=2e-3, atol=1e-5)  # small changes wait to be folded


def test_more_rounds_of_algorithm_1_take_prices_of_what_the_rounds_before_left():
    outcomes = []
    for iterations in (1, 2):
        method = autogate.GDP.published(lam=1.0, epochs=1, steps_per_epoch=100, iterations=iterations)
        net, bank = prepared(method)
        with torch.no_grad():
            bank.alpha[:10] = 1e-4  # the first round takes these to zero
        train(net, torch.optim.SGD(net.parameters(), 0.05), 1)
        outcomes.append(bank.alpha[16:40].clone())
        assert (bank.alpha[:10] == 0).all()
    assert (outcomes[1] > outcomes[0]).all(), "what reads fewer channels is charged for fewer"


def columns(net: ConvNet) -> list[Tensor]:
    return [net.conv2.weight, net.conv3.weight, net.fc.weight]


def norms(net: ConvNet) -> Tensor:
    return torch.cat([weight.transpose(0, 1).flatten(1).norm(dim=1) for weight in columns(net)])


def twin_of(net: ConvNet, scale: float) -> ConvNet:
    twin = ConvNet()
    twin.load_state_dict({name: value for name, value in net.state_dict().items() if "autogate" not in name})
    with torch.no_grad():
        for weight in columns(twin):
            weight /= scale
    return twin


def second_steps(method: autogate.GDP, lr: float) -> tuple[ConvNet, GateBank, Tensor]:
    """A net after its first step, in which norms are noted, and their squares' epsilon of a tenth."""
    net, bank = prepared(method)
    for parameter in net.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer = torch.optim.SGD(net.parameters(), lr)
    with torch.no_grad():
        optimizer.step()
    return net, bank, bank.first_norm.clone()


def test_gates_on_kernels_move_as_equation_10_says():
    """dF/dW of L(W g(|W|)), then the proximal step of lambda R on |W|, to first order in the rate."""
    lr, lam = 0.02, 1e-3
    net, bank, start = second_steps(autogate.GDP.published(lam=lam, epochs=1, steps_per_epoch=99, gate="kernel"), lr)
    gate = gate_value(bank.norm, 0.1)
    twin = ConvNet()
    twin.load_state_dict({name: value for name, value in net.state_dict().items() if "autogate" not in name})
    with torch.no_grad():
        for weight, part in zip(columns(twin), gate.float().split((16, 24, 24)), strict=True):
            weight /= part.view(1, -1, *[1] * (weight.ndim - 2))
    before = norms(twin).detach()
    torch.testing.assert_close(before, bank.norm * start, rtol=2e-3, atol=0)
    images, labels = batch(3)
    x = norms(twin)
    parts = (x**2 / (x**2 + 0.1 * start**2)).split((16, 24, 24))
    nn.functional.cross_entropy(twin(images, parts), labels).backward()
    with torch.no_grad():
        for weight in columns(twin):
            weight -= lr * weight.grad
    wanted = norms(twin).detach() - lr * lam * prices(net, bank, torch.ones(64))
    train(net, torch.optim.SGD(net.parameters(), lr), 1, first=3)
    assert (wanted - before).abs().max() > 1e-3
    torch.testing.assert_close(bank.norm * start - before, wanted - before, rtol=0.05, atol=5e-5)


def test_the_gate_as_a_penalty_moves_kernels_down_equation_11():
    lr, lam = 0.05, 0.02
    net, bank, start = second_steps(autogate.GDP.published(lam=lam, epochs=1, steps_per_epoch=99, gate="penalty"), lr)
    twin = twin_of(net, 1.0)
    x = norms(twin)
    gates = x**2 / (x**2 + 0.1 * start**2)
    images, labels = batch(3)
    loss = nn.functional.cross_entropy(twin(images), labels)
    (loss + lam * (prices(net, bank, gates) * gates).sum()).backward()
    with torch.no_grad():
        for weight in columns(twin):
            weight -= lr * weight.grad
    before = [weight.detach().clone() for weight in columns(net)]
    train(net, torch.optim.SGD(net.parameters(), lr), 1, first=3)
    for weight, old, wanted in zip(columns(net), before, columns(twin), strict=True):
        torch.testing.assert_close(weight - old, wanted.detach() - old, rtol=0.03, atol=2e-4)


@pytest.mark.slow
@pytest.mark.parametrize(("gate", "lam"), [("alpha", 2.0), ("kernel", 0.1), ("penalty", 0.1)])
def test_a_variant_closes_classes_and_slims_exactly(gate, lam):
    method = autogate.GDP.published(lam=lam, epochs=10, steps_per_epoch=10, epsilon_factor=0.4, gate=gate)
    net, bank = prepared(method)
    train(net, torch.optim.SGD(net.parameters(), 0.1), 100)
    assert 0 < int(bank.live.sum()) < 64 and bank.progress().settled
    images = batch(1)[0]
    wanted = run_eval(net, (images,))
    assert relative_error(run_eval(autogate.finalize(net), (images,)), wanted) <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("gate", ["kernel", "penalty"])
def test_variants_are_steered_to_a_budget_too(gate):
    net, bank = prepared(autogate.GDP(gate=gate), flops=0.5, steps=60)
    train(net, torch.optim.SGD(net.parameters(), 0.05), 60)
    assert abs(bank.shares()["FLOPs"] - 0.5) <= 0.01
    autogate.finalize(net)


def test_bad_settings_are_refused():
    for settings, message in [
        ({"gate": "beta"}, "gate is 'beta'"), ({"epsilon_factor": 1.9}, "epsilon_factor is 1.9"),
        ({"iterations": 0}, "iterations is 0"), ({"lam": -1}, "lam is -1"),
    ]:  # fmt: skip
        with pytest.raises(AutogateError, match=message):
            autogate.GDP(**settings)
    with pytest.raises(AutogateError, match=r"epsilon falls once an epoch\. Pass steps_per_epoch"):
        prepared(autogate.GDP(epsilon_factor=0.9))
