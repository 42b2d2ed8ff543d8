"""Norms across channels take their statistics over the live channels while gates train."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from timm.utils import ModelEmaV3
from torch import nn
from torch.optim.swa_utils import AveragedModel

import autogate
from rewriters import outputs
from rewriters.cross_channel.live_statistics import LiveStatistic


class Block(nn.Module):
    """A transformer's MLP over a residual stream."""

    def __init__(self, width: int):
        super().__init__()
        self.norm, self.fc1, self.fc2 = nn.LayerNorm(width), nn.Linear(width, 24), nn.Linear(24, width)

    def forward(self, x):
        return x + self.fc2(self.fc1(self.norm(x)).relu())


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), Block(16), Block(16), nn.RMSNorm(16), nn.Linear(16, 4))


EXAMPLE = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(0))


def prepared(**options) -> nn.Module:
    return autogate.prepare(net(), EXAMPLE, **{"flops": 0.4, "steps": 40, **options})


def statistics(model: nn.Module) -> list[LiveStatistic]:
    return [module for module in model.modules() if isinstance(module, LiveStatistic)]


def train(model: nn.Module, steps: int, after=lambda: None, run=None) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(steps):
        x = torch.randn(8, 5, 6, generator=torch.Generator().manual_seed(step))
        model.train()
        (run or model)(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        after()


@torch.no_grad()
def output(model: nn.Module) -> torch.Tensor:
    return model.eval()(EXAMPLE)


def assert_exact(model: nn.Module) -> None:
    gated = output(model)
    slim = autogate.finalize(model, warn=False)
    torch.testing.assert_close(output(slim), gated, rtol=1e-5, atol=1e-5)
    assert not statistics(slim)
    assert all("forward" not in module.__dict__ for module in slim.modules())
    assert slim[0].out_features == slim[1].norm.normalized_shape[0] == slim[3].normalized_shape[0] < 16


def stream(model: nn.Module) -> torch.Tensor:
    """Classes of the residual stream."""
    return autogate.gates(model).channel_map.classes[("0.weight", 0)]


def test_embeddings_shrink_in_training_and_norms_are_plain_again():
    model = prepared()
    names = list(net().state_dict())
    assert torch.equal(output(model), output(net()))
    assert len(statistics(model)) == 3
    assert [name for name in model.state_dict() if not name.startswith("autogate.")] == names
    train(model, 40)
    bank = autogate.gates(model)
    assert 0 < (~bank.live[stream(model)]).sum() < 16
    for statistic in statistics(model):
        assert torch.equal(statistic.live.bool(), bank.live[stream(model)])
        assert statistic.count == int(statistic.live.sum())
    assert_exact(model)


@pytest.mark.parametrize("share", [0.3, 0.7])
def test_channels_that_die_by_hand_are_not_looked_at(share):
    model = prepared()
    bank = autogate.gates(model)
    with torch.no_grad():
        bank.alpha[stream(model)[: int(16 * share)]] = 0
    output(model)
    assert {statistic.count for statistic in statistics(model)} == {16 - int(16 * share)}
    assert_exact(model)


def test_embeddings_stay_if_asked_for():
    model = prepared(embed=False, flops=0.6)
    assert not statistics(model)
    assert ("0.weight", 0) not in autogate.gates(model).channel_map.classes
    with torch.no_grad():
        autogate.gates(model).alpha[:5] = 0
    gated = output(model)
    slim = autogate.finalize(model, warn=False)
    torch.testing.assert_close(output(slim), gated, rtol=1e-5, atol=1e-5)
    assert slim[0].out_features == 16


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_goes_its_own_way(copied):
    model = prepared()
    with torch.no_grad():
        autogate.gates(model).alpha[stream(model)[:3]] = 0
    output(model)
    twin = copied(model)
    with torch.no_grad():
        autogate.gates(twin).alpha[stream(twin)[3:8]] = 0
    output(twin)
    assert {statistic.count for statistic in statistics(model)} == {13}
    assert {statistic.count for statistic in statistics(twin)} == {8}
    assert_exact(twin)
    assert_exact(model)


@pytest.mark.parametrize("average", [AveragedModel, lambda model: ModelEmaV3(model, decay=0.9)])
def test_what_norms_look_at_follows_in_an_average(average):
    model = prepared()
    averaged = average(model)
    update = getattr(averaged, "update_parameters", None) or averaged.update
    train(model, 40, lambda: update(model))
    output(averaged.module)
    counts = [statistic.count for statistic in statistics(model)]
    assert max(counts) < 16
    assert [statistic.count for statistic in statistics(averaged.module)] == counts
    assert_exact(averaged.module)


def test_what_norms_look_at_follows_a_checkpoint():
    model, fresh = prepared(), prepared()
    train(model, 40)
    fresh.load_state_dict(model.state_dict())
    assert [statistic.count for statistic in statistics(fresh)] == [statistic.count for statistic in statistics(model)]
    assert torch.equal(output(fresh), output(model))
    assert torch.equal(fresh[1](torch.ones(1, 16)), model[1](torch.ones(1, 16)))  # no forward of the model before
    assert_exact(fresh)


def test_an_earlier_checkpoint_brings_what_norms_look_at_back():
    model = prepared()
    early = copy.deepcopy(model.state_dict())
    train(model, 40)
    assert min(statistic.count for statistic in statistics(model)) < 16
    model.load_state_dict(early)
    assert {statistic.count for statistic in statistics(model)} == {16}
    assert torch.equal(output(model), output(net()))


def test_finalize_that_fails_leaves_the_live_statistics(monkeypatch):
    model = prepared()
    with torch.no_grad():
        autogate.gates(model).alpha[stream(model)[:5]] = 0
    gated = output(model)
    with monkeypatch.context() as patch, pytest.raises(autogate.VerificationError):
        patch.setattr(outputs, "relative_error", lambda *_: 1.0)
        autogate.finalize(model, warn=False)
    assert [statistic.count for statistic in statistics(model)] == [11, 11, 11]
    assert torch.equal(output(model), gated)
    assert_exact(model)


def test_a_checkpoint_of_the_plain_model_loads():
    model, plain = prepared(), net()
    missing, unexpected = model.load_state_dict(plain.state_dict(), strict=False)
    assert not unexpected and all(name.startswith("autogate.") for name in missing)


@pytest.mark.slow
def test_compiled_training_does_not_compile_anew_when_channels_die():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = prepared(steps=20)
    train(model, 20, run=torch.compile(model, fullgraph=True, backend="aot_eager"))
    assert 0 < (~autogate.gates(model).live[stream(model)]).sum() < 16
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    compiled = torch.compile(model.eval(), fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(EXAMPLE), model(EXAMPLE), rtol=1e-5, atol=1e-5)
    assert_exact(model)


def test_types_and_modes_reach_the_statistics():
    model = prepared().double()
    with torch.no_grad():
        autogate.gates(model).alpha[stream(model)[:5]] = 0
    example = EXAMPLE.double()
    with torch.no_grad():
        gated = model.eval()(example)
        slim = autogate.finalize(model, example, warn=False)
        torch.testing.assert_close(slim(example), gated, rtol=1e-12, atol=1e-12)


def test_prepare_that_fails_leaves_no_live_statistic():
    model = net()
    with pytest.raises(autogate.AutogateError, match="can't be reached"):
        autogate.prepare(model, EXAMPLE, flops=0.01, ignore=["1.fc1"])
    assert not statistics(model)
    assert all("forward" not in module.__dict__ for module in model.modules())


def test_an_embedding_that_dies_whole_keeps_a_channel():
    model = prepared()
    with torch.no_grad():
        autogate.gates(model).alpha[stream(model)] = 0
    gated = output(model)
    assert torch.isfinite(gated).all()
    slim = autogate.finalize(model, warn=False)
    torch.testing.assert_close(output(slim), gated, rtol=1e-5, atol=1e-5)
    assert slim[0].out_features == 1
