"""Models that are prepared on the meta device, and get their memory later."""

import pytest
import torch
from torch import nn

import autogate


def net() -> nn.Module:
    layers = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.ReLU(), nn.Flatten()
    return nn.Sequential(*layers, nn.Linear(96, 4))


IMAGES = torch.linspace(-1, 1, 2 * 3 * 8 * 8).view(2, 3, 8, 8)


def on_meta() -> nn.Module:
    with torch.device("meta"):
        model = net()
    return autogate.prepare(model, IMAGES.to("meta"), steps=100)


@pytest.fixture
def trained() -> nn.Module:
    torch.manual_seed(0)
    model = autogate.prepare(net(), IMAGES, steps=100)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(IMAGES).square().mean().backward()
        optimizer.step()
    return model


def test_a_model_on_meta_has_a_summary_and_runs():
    model = on_meta()
    assert "gates at zero         │ 0 of 14" in str(autogate.summary(model))
    assert model(IMAGES.to("meta")).shape == (2, 4)


@pytest.mark.parametrize("assign", [False, True])
def test_a_checkpoint_loads_into_a_model_from_meta(trained, assign):
    model = on_meta()
    autogate.summary(model)
    if not assign:
        model.to_empty(device="cpu")
    model.load_state_dict(trained.state_dict(), assign=assign)
    assert autogate.gates(model).progress() == autogate.gates(trained).progress()
    assert torch.equal(model(IMAGES), trained(IMAGES))


def test_gates_of_a_model_without_memory_begin_when_it_gets_some(trained):
    model = on_meta().to_empty(device="cpu")
    bank = autogate.gates(model)
    assert (bank.alpha == 1).all() and (bank.dead == 0).all() and bank.layout == autogate.gates(trained).layout
    model.load_state_dict({k: v for k, v in trained.state_dict().items() if "autogate" not in k}, strict=False)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model(IMAGES).square().mean().backward()
    optimizer.step()
    assert bank.progress().step == 1 and (bank.alpha < 1).all()


def test_a_model_from_meta_is_finalized(trained):
    model = on_meta().to_empty(device="cpu")
    model.load_state_dict(trained.state_dict())
    with torch.no_grad():
        autogate.gates(model).alpha[:3] = 0
    model.eval()
    gated = model(IMAGES)
    torch.testing.assert_close(autogate.finalize(model, warn=False)(IMAGES), gated)
