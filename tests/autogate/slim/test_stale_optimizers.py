"""Optimizers that are not named to finalize: those it has seen go on in the slim model, of others it tells."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

import autogate
from tests.autogate.loops.small_nets import EXAMPLE, Residual, batches


def prepared(**options) -> nn.Module:
    torch.manual_seed(0)
    return autogate.prepare(Residual(), EXAMPLE, flops=0.5, steps=60, **options)


def trains(optimizer: torch.optim.Optimizer, model: nn.Module) -> bool:
    return {id(p) for p in model.parameters()} == {id(p) for g in optimizer.param_groups for p in g["params"]}


def step(model: nn.Module, *optimizers: torch.optim.Optimizer) -> None:
    images, labels = next(iter(batches(1, size=8)))
    for optimizer in optimizers:
        optimizer.zero_grad()
    nn.functional.cross_entropy(model(images), labels).backward()
    for optimizer in optimizers:
        optimizer.step()


def close(model: nn.Module) -> None:
    with torch.no_grad():
        autogate.gates(model).alpha[:20] = 0


def test_an_optimizer_that_has_trained_the_model_goes_on():
    named, seen = prepared(), prepared()
    for model in (named, seen):
        optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
        step(model, optimizer)
        close(model)
        autogate.finalize(model, optimizer=optimizer if model is named else None, warn=False)
        assert trains(optimizer, model)
        assert optimizer.state[model.head.weight]["exp_avg"].shape == model.head.weight.shape
        for _ in range(3):
            step(model, optimizer)
    torch.testing.assert_close(dict(seen.state_dict()), dict(named.state_dict()), rtol=0, atol=0)


def test_all_that_have_trained_it_go_on_also_those_without_gated_kernels():
    model = prepared()
    biases = [p for p in model.parameters() if p.ndim == 1]
    two = [torch.optim.SGD(biases, 0.1), torch.optim.SGD([p for p in model.parameters() if p.ndim > 1], 0.1)]
    step(model, *two)
    close(model)
    autogate.finalize(model, optimizer=two[1], warn=False)
    held = {id(p) for one in two for p in one.param_groups[0]["params"]}
    assert held == {id(p) for p in model.parameters()}


def test_an_optimizer_that_trains_another_model_since_is_left_alone():
    model, other = prepared(), Residual()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    step(model, optimizer)
    optimizer.param_groups[0]["params"][:] = other.parameters()
    close(model)
    autogate.finalize(model, warn=False)
    assert trains(optimizer, other)


@pytest.mark.parametrize("hooks", [True, False])
def test_one_that_nobody_has_seen_is_told_at_its_first_step(hooks):
    model = prepared(hooks=hooks)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    if not hooks:
        step(model, optimizer)
    close(model)
    autogate.finalize(model, warn=False)
    with pytest.warns(UserWarning, match=r"11 of the 12 parameters of this SGD are no longer the model's"):
        optimizer.step()
    fresh = torch.optim.SGD(model.parameters(), 0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()
        step(model, fresh)
