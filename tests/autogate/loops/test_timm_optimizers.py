"""timm's optimizers and schedules: the budget is met under each, by plain, foreach and fused steps."""

import pytest
import torch
from timm.scheduler import CosineLRScheduler
from torch import nn

import autogate
from tests.autogate.loops.training import OPTIMIZERS, assert_exact, loss_of, net, optimizer_of, trained_by
from tests.slow import slow_but

FUSED = ("sgd", "momentum", "nesterov", "adam", "adamw")


@pytest.mark.parametrize("name", slow_but(("adamw",), OPTIMIZERS))
def test_timms_optimizers_meet_the_budget(name):
    """With timm's scheduler, which warms up from next to nothing."""
    steps = 80
    model, example = net(flops=0.5, steps=steps)
    optimizer = optimizer_of(model, name)
    schedule = CosineLRScheduler(optimizer, t_initial=steps, warmup_t=5, warmup_lr_init=1e-7, t_in_epochs=False)
    for step in range(steps):
        model.train()
        optimizer.zero_grad()
        loss_of(model, step).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step_update(step + 1)
    progress = autogate.gates(model).progress()
    assert progress.step == steps and progress.settled
    assert abs(progress.shares["FLOPs"] - 0.5) <= 0.01
    assert_exact(model, example)


WAYS = [*(f"{name} foreach" for name in OPTIMIZERS), *(f"{name} fused" for name in FUSED)]


@pytest.mark.parametrize("way", slow_but(("momentum foreach", "adamw foreach", "lamb foreach", "adamw fused"), WAYS))
def test_foreach_and_fused_steps_leave_the_gates_of_the_plain_one(way):
    name, way = way.split()
    bank, plain = (autogate.gates(trained_by(name, **options)) for options in ({way: True}, {"foreach": False}))
    assert (~bank.live).any() and torch.equal(bank.live, plain.live)
    torch.testing.assert_close(bank.alpha, plain.alpha, rtol=1e-3, atol=1e-5)


def test_alphas_first_step_is_the_same_under_every_optimizer():
    """Its rate is its own: of the kernels' only the part of their peak counts."""
    first, *others = (autogate.gates(trained_by(name, steps=1, flops=1.0)).alpha for name in OPTIMIZERS)
    assert (first != 1).any()
    assert all(torch.equal(alpha, first) for alpha in others)
