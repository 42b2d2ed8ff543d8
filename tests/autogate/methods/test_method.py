"""Any method learns through the bank: what it reads, proposes and stores is its own; all else comes with the bank."""

from __future__ import annotations

import copy
import io
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor, nn

import autogate
from autogate.gating.bank import GateBank
from autogate.methods.gdp import GDP
from autogate.methods.method import Gates, Grouping, Method, Proposal, Step
from autogate.steering.schedule import Schedule
from rewriters import relative_error, run_eval
from tests.autogate.gated_nets import ConvNet, bank_of, batch, conv_net_map, gated_net, train


@dataclass(frozen=True, kw_only=True, repr=False)
class Halving(Method):
    """Gates are alpha itself. Under pressure the quarter of classes that the loss depends on least are halved, and die.

    Its state is how often each class was halved.
    """

    deepest: float = 3.0

    def start(self, size):
        return {"halvings": torch.zeros(size)}

    def factor(self, alpha, state):
        return alpha

    def read(self, sums, gate, live):
        return torch.where(live, sums.gradient_products().abs(), 0.0)

    def propose(self, gates: Gates, reading: Tensor, step: Step) -> Proposal:
        halvings, alpha = gates.state["halvings"], gates.alpha
        if not step.movement:
            return Proposal(alpha, None, reading, {"halvings": halvings}, 0.0)
        order = torch.where(gates.live, reading, torch.inf).argsort()
        chosen = torch.zeros_like(gates.live).index_fill(0, order[: len(order) // 4], True) & gates.live
        halvings = halvings + chosen
        candidates = chosen & (halvings > self.deepest)
        return Proposal(torch.where(chosen, alpha / 2, alpha), candidates, reading, {"halvings": halvings}, 1.0)

    def hold_open(self, alpha, pressed):
        return alpha if pressed else torch.where(alpha != 0, 1.0, 0.0)


def net_with(method: Method) -> tuple[ConvNet, GateBank]:
    torch.manual_seed(0)
    net, channel_map = ConvNet(), conv_net_map()
    net.autogate = bank_of(net, channel_map, 0.5, method, steps=60)
    return net, net.autogate


def sgd(net: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(net.parameters(), 0.05, momentum=0.9)


def test_another_method_meets_the_target_in_an_ordinary_loop():
    net, bank = net_with(Halving())
    train(net, sgd(net), 60)
    assert bank.progress().settled and abs(bank.shares()["FLOPs"] - 0.5) <= 0.01
    assert (bank.halvings[~bank.live] > 3).all() and bank.halvings.max() > 0
    assert bank.folded[bank.live].min() > 0.9, "once the targets are met, gates that live are open"
    for kernel, of in ((net.conv2.weight, bank.live[:16]), (net.conv3.weight, bank.live[16:40])):
        assert (kernel[:, ~of] == 0).all() and (kernel[:, of] != 0).any((0, 2, 3)).all()


def test_its_state_goes_where_the_models_goes():
    net, bank = net_with(Halving())
    train(net, sgd(net), 12)
    assert {"autogate.alpha", "autogate.halvings"} <= net.state_dict().keys()
    assert "autogate.epsilon" not in net.state_dict() and bank.progress().method_state == {}
    other, again = net_with(Halving())
    other.load_state_dict(net.state_dict())
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    for copied in (again, copy.deepcopy(net).autogate, loaded.autogate):
        assert torch.equal(copied.halvings, bank.halvings) and torch.equal(copied.alpha, bank.alpha)
        assert copied.learner.method == Halving()


def test_a_run_with_it_is_resumed_bit_by_bit():
    whole, _ = net_with(Halving())
    train(whole, sgd(whole), 40)
    net, _ = net_with(Halving())
    optimizer = sgd(net)
    train(net, optimizer, 17)
    state = copy.deepcopy((net.state_dict(), optimizer.state_dict()))
    resumed, _ = net_with(Halving())
    optimizer = sgd(resumed)
    resumed.load_state_dict(state[0])
    optimizer.load_state_dict(state[1])
    train(resumed, optimizer, 23, first=17)
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name


@pytest.mark.parametrize("method", [GDP(), Halving()], ids=["GDP", "Halving"])
def test_what_a_method_closes_is_removed_exactly(method):
    torch.manual_seed(0)
    net = autogate.prepare(ConvNet(), torch.randn(2, 3, 6, 6), flops=0.4, steps=60, method=method)
    assert autogate.gates(net).learner.method == method
    train(net, sgd(net), 60)
    images = batch(1)[0]
    wanted = run_eval(net, (images,))
    slim = autogate.finalize(net)
    assert slim.conv2.in_channels < 16 and relative_error(run_eval(slim, (images,)), wanted) <= 1e-5


def test_a_method_is_asked_for_its_reading_before_the_optimizer_moves_the_kernels():
    seen = []

    @dataclass(frozen=True, repr=False)
    class Watching(GDP):
        def read(self, sums, gate, live):
            seen.append(net.conv2.weight.detach().clone())
            return super().read(sums, gate, live)

    net, _ = net_with(Watching())
    before = net.conv2.weight.detach().clone()
    train(net, torch.optim.SGD(net.parameters(), 0.5), 1)
    assert torch.equal(seen[0], before) and not torch.equal(net.conv2.weight, before)


def test_the_settings_of_gdp_are_its_own():
    start = GDP(epsilon_start=0.5).start(3)
    assert float(GDP(epsilon_start=0.5).factor(torch.ones(1), start)) == pytest.approx(1 / 1.5)
    gates = replace(gated_net()[1].learner.start(), alpha=torch.full((64,), 0.5))
    groups = Grouping([range(64)], torch.device("cpu"))
    step = Step(1, Schedule(100), lr=0.1, peak=0.1, price=torch.ones(64), movement=0.0, groups=groups)
    slow, quick = (GDP(alpha_rate=rate).propose(gates, torch.ones(64), step) for rate in (1e-4, 1e-3))
    torch.testing.assert_close(0.5 - quick.alpha, 10 * (0.5 - slow.alpha), rtol=1e-3, atol=0)
    assert GDP(decay=0.5).propose(gates, torch.ones(64), step).state["sensitivity"][0] == 0.5
    assert GDP(open_alpha=0.1).hold_open(torch.tensor([0.01, -0.01]), pressed=False).tolist() == pytest.approx(
        [0.1, -0.1]
    )


def test_a_method_prints_as_the_call_that_makes_it():
    assert repr(GDP()) == "GDP()" and repr(GDP(damping=0.3, reach=0.1)) == "GDP(damping=0.3)"
    assert repr(GDP(damping=0.3, reach=0.2, keep=0.5)) == "GDP(reach=0.2, keep=0.5, damping=0.3)"
    assert eval(repr(GDP(reach=0.2))) == GDP(reach=0.2)
