"""The learner moves alpha towards the budget, within its bounds, and never across zero."""

from dataclasses import replace

import pytest
import torch

from autogate.gating.bank import GateBank
from autogate.methods.gate_function import gate_slope
from autogate.methods.gdp import GDP
from autogate.methods.method import Grouping, Step
from autogate.methods.sensitivity import observed
from autogate.steering.schedule import Schedule
from tests.autogate.gated_nets import backward, batch, gated_net


def random_gradients(bank: GateBank, size: float, pull: bool, generator: torch.Generator) -> None:
    for kernel in bank.kernels():
        noise = torch.randn(kernel.shape, generator=generator)
        kernel.grad = -size * kernel.detach() if pull else size * noise


@pytest.mark.parametrize("target", [0.2, 0.5, 0.85])
@pytest.mark.parametrize(("steps", "lr"), [(30, 0.1), (150, 0.1), (150, 1e-4)])
@pytest.mark.parametrize(("size", "pull"), [(1e-2, False), (10.0, False), (1.0, True)])
def test_the_target_is_met_in_time_whatever_the_gradients(target, steps, lr, size, pull):
    """Noise of any size, or gradients that hold every gate open: done at 90 % of the steps, and polarized."""
    _, bank = gated_net(target, steps)
    dearest = (1 - bank.targets.distance_without_each(bank.live)).max().item()
    generator = torch.Generator().manual_seed(0)
    for step in range(steps):
        random_gradients(bank, size, pull, generator)
        bank.measure()
        bank.step(lr)
        assert bank.targets.distance(bank.live) >= bank.schedule.wanted(step + 1) - dearest
        if step + 1 >= 0.9 * steps:
            assert abs(bank.shares()["FLOPs"] - target) <= 0.01
    gates = bank.folded[bank.live]
    assert gates.min() > 0.5 and (bank.folded[~bank.live] == 0).all()
    assert bank.alpha.min() >= 0


def test_alpha_never_crosses_zero_by_a_gradient():
    """Gradients that want every gate closed, without pressure: nothing dies and no sign flips."""
    _, bank = gated_net(1.0, steps=400)
    with torch.no_grad():
        bank.alpha[::2] *= -1
    sign = bank.alpha.sign()
    for _step in range(400):
        for kernel in bank.kernels():
            kernel.grad = 1e3 * kernel.detach()
        bank.step(0.1)
        assert torch.equal(bank.alpha.sign(), sign)
    assert bank.alpha.abs().max() < 1 and bank.folded.min() > 0.5


def test_a_gradient_brings_alpha_no_nearer_to_zero_than_an_open_gate_needs():
    _net, bank = gated_net(0.5, steps=100)
    bank.alpha.copy_(torch.linspace(1e-5, 0.05, 64))
    start = bank.alpha.clone()
    bank.alpha[::2] *= -1
    for _step in range(10):
        gates = replace(bank.learner.start(), alpha=bank.alpha)
        bank.alpha.copy_(GDP().descend(gates, torch.full((64,), 1e6), 1.0, GDP().step_bound(bank.schedule)))
    assert torch.equal(bank.alpha.abs(), start.clamp(max=1e-3)) and (bank.alpha[::2] < 0).all()


def test_gates_that_the_threshold_spared_open_again_without_pressure():
    _net, bank = gated_net(1.0, steps=50)
    bank.alpha[:8] = 1e-5
    bank.alpha[4:8] *= -1
    for _step in range(50):
        bank.step(0.1)
    assert bank.live.all() and bank.folded.min() > 0.9
    assert (bank.alpha[:4] > 0).all() and (bank.alpha[4:8] < 0).all()


def test_the_threshold_leaves_no_live_gate_too_small_to_scale_back_from():
    _net, bank = gated_net(0.5, steps=100)
    gates = replace(bank.learner.start(), alpha=torch.full((64,), 0.01 * (1 + 1e-4)))
    groups = Grouping([range(64)], torch.device("cpu"))
    step = Step(1, bank.schedule, 0.1, 0.1, torch.ones(64), movement=0.01, groups=groups)
    proposal = GDP().propose(gates, torch.zeros(64), step)
    assert not proposal.candidates.any() and (proposal.alpha < 1e-5).all()
    assert (GDP().hold_open(proposal.alpha, pressed=True) == torch.tensor(1e-5)).all()


def test_a_kill_by_hand_between_forward_and_step_is_final():
    net, bank = gated_net(1.0, steps=100)
    backward(net)
    with torch.no_grad():
        bank.alpha[3] = 0
    bank.measure()
    bank.step(0.1)
    assert bank.alpha[3] == 0 and not bank.live[3] and net.conv2.weight[:, 3].abs().max() == 0


def test_learning_spares_each_groups_last_classes_but_a_hand_may_not():
    net, bank = gated_net(0.1, steps=60, keep=0.1)
    with torch.no_grad():
        bank.alpha[16:40] = torch.linspace(0.3, 1, 24)
    generator = torch.Generator().manual_seed(0)
    for _step in range(60):
        random_gradients(bank, 1e-3, False, generator)
        bank.measure()
        bank.step(0.1)
    for group in bank.channel_map.groups():
        assert bank.live[list(group.classes)].sum() >= 2
    bank.alpha[16:40] = 0
    net(batch(0)[0])
    assert not bank.live[16:40].any()


def test_alphas_rate_is_the_share_of_the_largest_learning_rate_so_far():
    """Whatever the scale of the kernels' rate: a quarter of the step at a quarter of the peak, none at none."""
    _net, bank = gated_net(1.0, steps=10**6)
    gradient = torch.full((64,), 100.0)
    full = GDP().alpha_rate * gradient * gate_slope(torch.ones(64), 0.1)
    for scale in (1e-4, 0.1, 10.0):
        gates = bank.learner.start()
        for lr, part in ((0.0, 0.0), (scale, 1.0), (scale / 4, 0.25), (2 * scale, 1.0), (scale, 0.5)):
            after = bank.learner.step(gates, gradient, lr)
            torch.testing.assert_close(gates.alpha - after.alpha, part * full, rtol=0.03, atol=1e-7)
            gates = after
        assert gates.peak == 2 * scale


def test_epsilon_falls_as_long_as_the_targets_do():
    _, bank = gated_net(1.0, steps=1000)
    course = [
        float(bank.learner.step(replace(bank.learner.start(), count=count - 1), torch.zeros(64), 0.1).state["epsilon"])
        for count in (100, 199, 200, 1000)
    ]
    assert GDP().epsilon_start > course[0] > course[1] > GDP().epsilon_end
    assert course[2] == course[3] == pytest.approx(GDP().epsilon_end)


def test_slope_enters_the_step_with_the_present_epsilon():
    _, bank = gated_net(1.0, steps=10)
    bank.epsilon.fill_(0.01)
    bank.fold()
    for kernel in bank.kernels():
        kernel.grad = 100 * kernel.detach()
    bank.measure()
    expected = GDP().alpha_rate * bank._stepping.pending.reading * gate_slope(bank.alpha, 0.01)
    before = bank.alpha.clone()
    bank.step(0.1)
    torch.testing.assert_close(before - bank.alpha, expected, rtol=1e-3, atol=1e-7)


def test_the_bank_keeps_the_running_mean_of_squared_gradients_and_its_checkpoint_has_it():
    net, bank = gated_net(0.5, steps=100)
    generator = torch.Generator().manual_seed(0)
    expected = torch.zeros(64, dtype=torch.float64)
    for _step in range(3):
        random_gradients(bank, 1e-3, pull=False, generator=generator)
        bank.measure()
        expected = observed(expected, bank._stepping.pending.reading, GDP().decay)
        bank.step(0.1)
    assert (expected > 0).all() and torch.equal(bank.sensitivity, expected)
    again, other = gated_net(0.5, steps=100)
    again.load_state_dict(net.state_dict())
    assert torch.equal(other.sensitivity, expected)


def test_gates_stand_still_once_the_targets_are_met_and_epsilon_is_at_its_end(monkeypatch):
    _, bank = gated_net(0.5, steps=100)
    generator = torch.Generator().manual_seed(0)

    def take(steps: int) -> None:
        for _ in range(steps):
            random_gradients(bank, 1.0, False, generator)
            bank.measure()
            with torch.no_grad():
                for kernel in bank.kernels():
                    kernel.sub_(0.01 * kernel.grad)
            bank.step(0.1)

    while not (bank.progress().settled and bank.progress().step >= bank.schedule.reach_steps):
        take(1)
    done = bank.progress().step
    assert done < 50 and bank.epsilon.item() == pytest.approx(GDP().epsilon_end)
    take(1)  # settled by what had died before it
    alpha, folded, kept = bank.alpha.clone(), bank.folded.clone(), bank.sensitivity.clone()
    assert folded[bank.live].min() >= 0.95
    monkeypatch.setattr(type(bank._kernels), "products", None)  # gradients are not read any more
    take(100 - done - 1)
    assert torch.equal(bank.alpha, alpha) and torch.equal(bank.folded, folded) and torch.equal(bank.sensitivity, kept)
    assert bank.progress().step == 100 and bank.progress().balance == 0
    take(1)
    assert bank.progress().step == 100
    for side in bank._kernels.find(bank.alpha.device).sides:
        dead = bank._kernels.on_side(bank._kernels.spread(bank.dead > 0, False), side)
        assert (side.weight.index_select(side.dim, torch.nonzero(dead).flatten()) == 0).all()
    assert not bank.live.all()


def test_targets_that_count_as_met_leave_every_live_gate_open():
    """The step that settles for a little above the target is under pressure: it opens what that had nearly closed."""
    _, bank = gated_net(0.5, steps=100)
    chosen = bank.learner.selection.deaths
    bank.learner.selection.deaths = lambda *args: replace(chosen(*args), settled=True)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        bank.alpha[1::2] = 2e-5
    while not bank.settled:
        random_gradients(bank, 1e-3, False, generator)
        bank.measure()
        bank.step(0.1)
    assert bank.alpha[bank.live].min() >= GDP().open_alpha


def test_short_runs_may_take_longer_steps():
    assert GDP().step_bound(Schedule(10_000)) == 0.02
    assert GDP().step_bound(Schedule(100)) > 4 / 36
