"""Loops that step the gates themselves, by `autogate.step`."""

import copy

import pytest
import torch
from torch import nn

import autogate
from tests.autogate.loops.small_nets import EXAMPLE, Residual, batches
from tests.autogate.loops.training import OPTIMIZERS, assert_exact, net, train, trained_by


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_loop_without_hooks_takes_the_same_course(name):
    hooked, called = trained_by(name), trained_by(name, hooks=False)
    state = called.state_dict()
    for key, value in hooked.state_dict().items():
        assert torch.equal(value, state[key]), key
    assert (~autogate.gates(called).live).any()
    assert_exact(called, EXAMPLE)


@pytest.mark.parametrize("fused", [False, True])
def test_without_hooks_a_step_that_the_scaler_skips_is_left_out(fused):
    """The loop sees by the scale that falls whether the step was taken."""

    def trained(hooks: bool) -> autogate.GateBank:
        torch.manual_seed(0)
        model = autogate.prepare(Residual(), EXAMPLE, flops=0.5, steps=30, hooks=hooks)
        optimizer = torch.optim.AdamW(model.parameters(), 1e-3, fused=fused)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        for step, (images, labels) in enumerate(batches(31, size=8)):
            optimizer.zero_grad()
            scaler.scale(nn.functional.cross_entropy(model(images), labels)).backward()
            if step == 9:
                model.stem[0].weight.grad[0] = float("inf")
            before = scaler.get_scale()
            scaler.step(optimizer)
            scaler.update()
            if not hooks and scaler.get_scale() >= before:
                autogate.step(model, lr=1e-3)
        assert scaler.get_scale() == 512
        return autogate.gates(model)

    hooked, called = trained(hooks=True), trained(hooks=False)
    assert called.progress().step == 30 and called.progress().settled
    assert torch.equal(called.alpha, hooked.alpha)


def test_without_hooks_no_optimizer_moves_a_gate():
    model, _ = net(steps=10, hooks=False)
    train(copy.deepcopy(model), 2)
    train(model, 2)
    assert autogate.gates(model).progress().step == 0


def test_the_step_of_a_model_whose_gates_move_by_themselves_is_refused():
    model, _ = net(steps=10)
    with pytest.raises(autogate.AutogateError, match="already move"):
        autogate.step(model, lr=0.1)
