"""A run that would cost a model its accuracy is told of in its first steps."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable

import pytest
import torch
from torch import nn

import autogate
from autogate.gating.first_steps import FirstSteps, looks_untrained
from tests.autogate.loops.small_nets import EXAMPLE, Residual


def trained() -> Residual:
    """A network whose norms have seen data."""
    torch.manual_seed(0)
    net = Residual()
    with torch.no_grad():
        for norm in (net.stem[1], net.block[1]):
            norm.weight.uniform_(0.5, 1.5)
            norm.bias.uniform_(-0.1, 0.1)
    return net


def told(model: nn.Module, parameters: Iterable[nn.Parameter], steps: int = 3, **settings: float) -> list[str]:
    """What a plain loop is warned of."""
    optimizer = torch.optim.SGD(parameters, **{"lr": 0.05, **settings})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(steps):
            optimizer.zero_grad()
            model(EXAMPLE).square().mean().backward()
            optimizer.step()
    return [str(one.message) for one in caught]


def test_a_run_that_is_fine_is_told_nothing():
    model = autogate.prepare(trained(), EXAMPLE, steps=100)
    assert told(model, model.parameters()) == []


def test_only_a_head_in_the_optimizer_is_told():
    model = autogate.prepare(trained(), EXAMPLE, steps=100)
    (message,) = told(model, model.head.parameters())
    assert message.startswith("no optimizer trains 98% of the gated weights (block.0.weight, block.3.weight)")
    assert "ignore=[" in message


def test_parameters_that_need_no_gradients_count_as_not_trained():
    model = autogate.prepare(trained().requires_grad_(False), EXAMPLE, steps=100)
    model.head.requires_grad_(True)
    (message,) = told(model, model.parameters())
    assert message.startswith("no optimizer trains 98% of the gated weights")


def test_an_optimizer_without_any_gated_kernel_is_told_too():
    model = autogate.prepare(trained(), EXAMPLE, steps=100)
    (message,) = told(model, [model.head.bias])
    assert message.startswith("no optimizer trains 100% of the gated weights")


def test_two_optimizers_that_train_all_are_fine():
    model = autogate.prepare(trained(), EXAMPLE, steps=100)
    head = set(model.head.parameters())
    both = [torch.optim.SGD(head, 0.1), torch.optim.SGD([p for p in model.parameters() if p not in head], 0.1)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            model(EXAMPLE).sum().backward()
            for optimizer in both:
                optimizer.step()


def test_another_models_optimizer_is_none_of_it():
    model, other = autogate.prepare(trained(), EXAMPLE, steps=100), trained()
    assert told(other, other.head.parameters()) == []
    assert told(model, model.parameters()) == []


def test_a_loss_of_another_model_is_told():
    model, other = autogate.prepare(trained(), EXAMPLE, steps=100), trained()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    other(EXAMPLE).sum().backward()
    optimizer.step()
    with pytest.warns(UserWarning, match="no gated kernel has had a gradient"):
        optimizer.step()


def test_a_loop_without_hooks_is_told_as_well():
    model = autogate.prepare(Residual(), EXAMPLE, steps=6, hooks=False)
    with pytest.warns(UserWarning) as caught:
        autogate.step(model, lr=0.1)
        autogate.step(model, lr=0.1)
    messages = [str(one.message) for one in caught]
    assert [message.split(":")[0] for message in messages] == [
        "the model looks untrained",
        "the run has 6 steps, too few to learn which channels matter. `steps` of autogate.prepare counts optimizer "
        "steps, not epochs",
        "no gated kernel has had a gradient in the first steps",
    ]


def test_a_few_steps_and_a_random_start_are_told_once():
    model = autogate.prepare(Residual(), EXAMPLE, steps=6)
    assert [message.split(",")[0] for message in told(model, model.parameters())] == [
        "the model looks untrained: all its norms are as they were initialised",
        "the run has 6 steps",
    ]
    assert told(model, model.parameters()) == []
    assert told(copy.deepcopy(model), model.parameters()) == []


def test_gates_that_are_loaded_belong_to_a_run_that_goes_on():
    model, again = (autogate.prepare(Residual(), EXAMPLE, steps=6) for _ in range(2))
    told(model, model.parameters())
    again.load_state_dict(model.state_dict())
    assert told(again, again.parameters()) == []


@pytest.mark.parametrize("norm", [nn.BatchNorm2d(4), nn.LayerNorm(4), nn.GroupNorm(2, 4), nn.RMSNorm(4)])
def test_a_norm_that_has_learned_or_seen_data(norm):
    model = nn.Sequential(norm)
    assert looks_untrained(model)
    with torch.no_grad():
        norm.weight[1] = 0.9
    assert not looks_untrained(model)


def test_statistics_alone_tell_that_a_model_has_seen_data():
    model = nn.Sequential(nn.BatchNorm2d(4))
    model(torch.randn(8, 4, 3, 3))
    assert not looks_untrained(model)


def test_of_a_model_without_norms_nothing_is_said():
    assert not looks_untrained(nn.Sequential(nn.Linear(2, 2)))


def test_the_watch_ends():
    model = autogate.prepare(trained(), EXAMPLE, steps=100)
    watch: FirstSteps = autogate.gates(model)._watch.first_steps
    assert not watch.over
    told(model, model.parameters())
    assert watch.over
