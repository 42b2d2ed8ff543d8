"""Hooks on the model and the optimizer move the gates."""

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

from autogate.gating import hooks
from rewriters import AutogateError
from tests.autogate.gated_nets import ConvNet, backward, batch, gated_net, train

OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, 0.1),
    "nesterov foreach": lambda parameters: torch.optim.SGD(parameters, 0.1, momentum=0.9, nesterov=True, foreach=True),
    "adam": lambda parameters: torch.optim.Adam(parameters, 1e-3),
    "adamw fused": lambda parameters: torch.optim.AdamW(parameters, 1e-3, fused=True),
    "rmsprop": lambda parameters: torch.optim.RMSprop(parameters, 1e-3),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizers_step_is_a_step_of_the_gates(name):
    net, bank = gated_net(steps=100)
    optimizer = OPTIMIZERS[name](net.parameters())
    train(net, optimizer, 3)
    assert bank.step_count == 3
    with torch.no_grad():
        bank.alpha[:3] = 0
    train(net, optimizer, 2)
    assert bank.step_count == 5 and net.conv2.weight[:, :3].abs().max() == 0


def test_the_hook_and_a_caller_take_the_same_path():
    hooked, called = gated_net(steps=50), gated_net(steps=50)
    optimizers = [torch.optim.SGD(net.parameters(), 0.1, momentum=0.9) for net, _ in (hooked, called)]
    hooks.unregister(called[1])
    for _ in range(30):
        for net, _ in (hooked, called):
            backward(net)
        optimizers[0].step()
        called[1].measure()
        optimizers[1].step()
        called[1].step(0.1)
    assert torch.equal(hooked[1].alpha, called[1].alpha)
    assert torch.equal(hooked[0].conv2.weight, called[0].conv2.weight)


def test_gradients_are_read_before_the_optimizer_writes_into_them():
    """Nesterov's foreach step adds its momentum to .grad."""
    alphas = []
    for foreach in (False, True):
        net, bank = gated_net(1.0, steps=100)
        optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9, nesterov=True, foreach=foreach)
        for _ in range(5):
            backward(net)
            optimizer.step()
        alphas.append(bank.alpha)
    torch.testing.assert_close(*alphas, rtol=1e-4, atol=1e-6)


def test_accumulated_gradients_take_one_step():
    net, bank = gated_net()
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    for _ in range(4):
        images, labels = batch(0)
        nn.functional.cross_entropy(net(images), labels).backward()
    optimizer.step()
    assert bank.step_count == 1


def test_optimizers_of_other_models_are_ignored():
    _, bank = gated_net()
    other = ConvNet()
    train(other, torch.optim.SGD(other.parameters(), 0.1), 2)
    assert bank.step_count == 0


def test_several_optimizers_step_the_gates_once_a_round():
    net, bank = gated_net(steps=100)
    most = torch.optim.SGD([*net.conv2.parameters(), *net.conv3.parameters()], 0.1)
    few = torch.optim.SGD(net.fc.parameters(), 0.5)
    for round_ in range(4):
        backward(net)
        most.step()
        few.step()
        assert bank.step_count == round_ + 1


def test_after_a_minor_optimizers_step_dead_columns_are_zero():
    net, bank = gated_net(steps=100)
    most = torch.optim.SGD([*net.conv2.parameters(), *net.conv3.parameters()], 0.1)
    few = torch.optim.SGD(net.fc.parameters(), 0.5)
    with torch.no_grad():
        bank.alpha[40:44] = 0
    backward(net)
    most.step()
    few.step()
    assert net.fc.weight[:, :4].abs().max() == 0 and bank.step_count == 1


def test_a_new_optimizer_takes_over_from_one_that_is_given_up():
    net, bank = gated_net(steps=100)
    old = torch.optim.SGD(net.parameters(), 0.1)
    train(net, old, 3)
    new = torch.optim.Adam(net.parameters(), 1e-3)
    train(net, new, 5)
    assert bank.step_count == 3 + 4
    train(net, new, 5)
    assert bank.step_count == 3 + 9


def test_a_subclass_that_calls_its_parents_step_steps_once():
    class Logged(torch.optim.SGD):
        def step(self, closure=None):
            return super().step(closure)

    net, bank = gated_net()
    torch.optim.SGD([nn.Parameter(torch.ones(1))], 0.1)  # has the parent class's step hooked
    train(net, Logged(net.parameters(), lr=0.1), 3)
    assert bank.step_count == 3


def test_a_wrapping_optimizer_steps_once():
    class Wrapper(torch.optim.Optimizer):
        def __init__(self, inner):
            super().__init__(inner.param_groups, {})
            self.inner = inner

        def step(self, closure=None):
            return self.inner.step(closure)

    net, bank = gated_net()
    train(net, Wrapper(torch.optim.SGD(net.parameters(), 0.1)), 3)
    assert bank.step_count == 3


@pytest.mark.parametrize("how", ["positional", "keyword", "subclass"])
def test_a_closure_leads_to_the_same_gates_as_a_backward_before_the_step(how):
    class Passing(torch.optim.SGD):
        def step(self, closure=None):
            return super().step(closure)

    plain, bank = gated_net(0.5, steps=30)
    optimizer = torch.optim.SGD(plain.parameters(), 0.1, momentum=0.9)
    train(plain, optimizer, 30)
    net, theirs = gated_net(0.5, steps=30)
    kind = Passing if how == "subclass" else torch.optim.SGD
    optimizer = kind(net.parameters(), 0.1, momentum=0.9)
    for step in range(30):

        def closure(step=step):
            backward(net, seed=step)
            return torch.tensor(0.0)

        optimizer.step(closure=closure) if how == "keyword" else optimizer.step(closure)
    assert theirs.step_count == 30 and (~bank.live).any()
    for name, value in net.state_dict().items():
        assert torch.equal(value, plain.state_dict()[name]), name


def test_a_step_that_raises_does_not_block_the_next():
    net, bank = gated_net()
    optimizer = torch.optim.SGD(net.parameters(), 0.1)

    def closure():
        raise ValueError

    with pytest.raises(ValueError):
        optimizer.step(closure)
    train(net, optimizer, 2)
    assert bank.step_count == 2


@pytest.mark.parametrize("fused", [False, True])
def test_a_scalers_scale_does_not_reach_the_gates(fused):
    """Same gates with a GradScaler as without, whether it unscales or the fused optimizer does."""
    alphas = []
    for scaled in (False, True):
        net, bank = gated_net(1.0)
        optimizer = torch.optim.SGD(net.parameters(), 0.01, momentum=0.9, fused=fused)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=scaled)
        for _ in range(3):
            images, labels = batch(0)
            optimizer.zero_grad()
            scaler.scale(nn.functional.cross_entropy(net(images), labels)).backward()
            scaler.step(optimizer)
            scaler.update()
        assert bank.step_count == 3
        alphas.append(bank.alpha)
    assert (alphas[0] != 1).any()
    torch.testing.assert_close(*alphas, rtol=0, atol=1e-6)


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_the_scaler_skips_moves_no_gate(fused):
    net, _ = gated_net()
    optimizer = torch.optim.SGD(net.parameters(), 0.1, fused=fused)
    scaler = torch.amp.GradScaler("cpu")
    before = {name: value.clone() for name, value in net.state_dict().items()}
    scaler.scale(torch.ones(()))
    backward(net)
    net.conv1.weight.grad[0] = float("inf")  # not a gated kernel
    scaler.step(optimizer)
    scaler.update()
    for name, value in net.state_dict().items():
        if "running" not in name and "tracked" not in name:
            assert torch.equal(value, before[name]), name


def test_a_loss_that_is_nan_moves_no_gate_and_no_later_one_does():
    """The weights are lost from there on; the gates are those of the last good step."""
    net, bank = gated_net(0.5, steps=40)
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
    train(net, optimizer, 12)
    assert (~bank.live).any()
    before = {name: value.clone() for name, value in bank.named_buffers()}
    backward(net, 12, scale=float("nan"))
    optimizer.step()
    train(net, optimizer, 2, first=13)
    for name, value in bank.named_buffers():
        assert torch.equal(value, before[name]), name
    dead = torch.nonzero(~bank.live[:16]).flatten()
    assert net.conv2.weight.isnan().any() and net.conv2.weight[:, dead].abs().sum() == 0


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_the_step_that_makes_an_optimizers_state_is_none_of_the_gates(kind):
    """torch.distributed.checkpoint takes it where there is no state yet: gradients and learning rate are zero."""
    net, bank = gated_net(0.5, steps=40)
    train(net, torch.optim.SGD(net.parameters(), 0.1), 10)
    net.zero_grad()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    get_optimizer_state_dict(net, kind(net.parameters(), 0.1))
    assert bank.step_count == 10
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_alpha_goes_with_the_learning_rate_of_most_gated_kernels():
    ways = []
    for slow_head in (False, True):
        net, bank = gated_net(1.0)
        body = [p for name, p in net.named_parameters() if not name.startswith("fc")]
        groups = [
            {"params": net.fc.parameters(), "lr": 1e-5 if slow_head else 0.01},
            {"params": body, "lr": 0.01},
        ]
        optimizer = torch.optim.SGD(groups)
        before = bank.alpha.clone()
        backward(net)
        optimizer.step()
        ways.append(bank.alpha - before)
    assert ways[0].abs().max() > 0 and torch.equal(*ways)


def test_alpha_goes_with_the_learning_rate_of_the_leading_optimizer():
    ways = []
    for rate_of_few in (0.01, 5.0):
        net, bank = gated_net(1.0)
        few = torch.optim.SGD(net.fc.parameters(), rate_of_few)
        most = torch.optim.SGD([*net.conv2.parameters(), *net.conv3.parameters()], 0.01)
        before = bank.alpha.clone()
        backward(net)
        most.step()
        few.step()
        ways.append(bank.alpha - before)
    assert ways[0].abs().max() > 0 and torch.equal(*ways)


def test_each_of_several_optimizers_has_a_schedule():
    net, bank = gated_net(0.5, steps=80)
    body = [parameter for name, parameter in net.named_parameters() if not name.startswith("fc")]
    optimizers = [torch.optim.SGD(body, 0.1, momentum=0.9), torch.optim.AdamW(net.fc.parameters(), 1e-3)]
    schedules = [torch.optim.lr_scheduler.OneCycleLR(optimizers[0], 0.1, 80),
                 torch.optim.lr_scheduler.StepLR(optimizers[1], 10, 0.5)]  # fmt: skip
    for step in range(80):
        backward(net, step)
        for each in (*optimizers, *schedules):
            each.step()
    end = bank.progress()
    assert end.step == 80 and end.settled and abs(end.shares["FLOPs"] - 0.5) <= 0.01


@pytest.mark.parametrize("as_tensor", [False, True])
def test_a_warm_up_from_nothing_is_no_hindrance(as_tensor):
    """The first learning rate is zero, a float or (as a captured or compiled step has it) a tensor."""
    net, bank = gated_net(0.5, steps=80)
    optimizer = torch.optim.AdamW(net.parameters(), torch.tensor(1e-2) if as_tensor else 1e-2, foreach=False)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, step / 10))
    before = {name: value.clone() for name, value in net.state_dict().items()}
    for step in range(80):
        backward(net, step)
        optimizer.step()
        if step == 0:
            assert optimizer.param_groups[0]["lr"] == 0 and bank.step_count == 1
            assert bank.live.all() and torch.isfinite(bank.alpha).all() and bank.balance == 0
            ratio = (bank.folded / before["autogate.folded"])[:16].view(1, -1, 1, 1)
            torch.testing.assert_close(net.conv2.weight.detach(), before["conv2.weight"] * ratio)
        schedule.step()
    end = bank.progress()
    assert end.step == 80 and end.settled and abs(end.shares["FLOPs"] - 0.5) <= 0.01
    assert torch.isfinite(bank.alpha).all()


@pytest.mark.parametrize(
    ("optimizer", "lr", "target", "steps"),
    [
        (torch.optim.SGD, 0.1, 0.5, 200),
        (torch.optim.SGD, 0.01, 0.3, 100),
        (torch.optim.Adam, 1e-3, 0.7, 200),
        (torch.optim.Adam, 1e-4, 0.4, 100),
    ],
)
def test_a_plain_loop_meets_the_target_and_polarizes(optimizer, lr, target, steps):
    net, bank = gated_net(target, steps)
    options = {"momentum": 0.9, "weight_decay": 1e-4} if optimizer is torch.optim.SGD else {}
    trained = optimizer(net.parameters(), lr, **options)
    losses = train(net, trained, steps)
    end = bank.progress()
    assert abs(end.shares["FLOPs"] - target) <= 0.01 and end.settled and end.step == steps
    assert (bank.folded[bank.live] > 0.5).all() and (bank.folded[~bank.live] == 0).all()
    assert all(map(torch.Tensor.isfinite, map(torch.Tensor.sum, net.state_dict().values())))
    assert sum(losses[-30:]) < 1.05 * sum(losses[:30])


def test_training_on_after_the_last_step_is_plain_fine_tuning():
    net, bank = gated_net(0.5, steps=40)
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
    train(net, optimizer, 40)
    alpha, live = bank.alpha.clone(), bank.live.clone()
    train(net, optimizer, 5, first=40)
    assert bank.step_count == 40 and torch.equal(bank.alpha, alpha) and torch.equal(bank.live, live)
    dead = torch.nonzero(~live[:16]).flatten()
    assert len(dead) and net.conv2.weight[:, dead].abs().max() == 0


def test_dead_columns_stay_zero_where_a_step_leaves_no_trace():
    """Many an optimizer writes by `.data`, as the replay of a CUDA graph does: no version tells of it."""

    class ByData(torch.optim.SGD):
        def step(self, closure=None):
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.data.sub_(group["lr"] * torch.ones_like(parameter))

    net, bank = gated_net(0.5, steps=10)
    optimizer = ByData(net.parameters(), 1e-3)
    train(net, optimizer, 14)
    dead = torch.nonzero(~bank.live[:16]).flatten()
    assert bank.step_count == 10 and len(dead)
    assert net.conv2.weight[:, dead].abs().max() == 0 and net.conv2.weight.abs().max() > 0


def test_nothing_dies_for_the_whole_of_the_flops():
    net, bank = gated_net(1.0, steps=60)
    train(net, torch.optim.SGD(net.parameters(), 0.1), 60)
    assert bank.live.all() and bank.folded.min() > 0.99


def test_a_step_that_a_cuda_graph_is_to_hold_is_refused(monkeypatch):
    """It would end in CUDA's own error about a value that is read. `test_cuda.py` has a real capture."""
    net, _bank = gated_net(0.5, steps=40)
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    backward(net)
    monkeypatch.setattr(hooks, "is_capturing", lambda: True)
    with pytest.raises(AutogateError, match="hooks=False"):
        optimizer.step()
    torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], 0.1).step()


def test_a_forward_that_is_captured_folds_nothing(monkeypatch):
    net, bank = gated_net(0.5, steps=40)
    with torch.no_grad():
        bank.alpha[0] = 0
    monkeypatch.setattr(hooks, "is_capturing", lambda: True)
    net(batch(0)[0])
    assert not bank.dead.any()
    monkeypatch.undo()
    net(batch(0)[0])
    assert not bank.live[0]
