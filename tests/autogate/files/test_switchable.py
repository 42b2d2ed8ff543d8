"""Switchable models in files: bit for bit, with all their subnets."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from torch import nn

import autogate
from autogate import subnets
from autogate.switching import SUBNETS
from benchmarks.parts import randomise_norms
from tests.autogate.switching.nets import closed, fused


def built(name: str = "test_resnet", **arguments):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=4, **arguments)
    randomise_norms(model)
    return model.eval()


EXAMPLE = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def trained(switchable: nn.Module) -> nn.Module:
    """After a step in which all subnets have seen something else."""
    optimizer = torch.optim.SGD(switchable.parameters(), lr=0.1)
    for active in subnets.each(switchable.train()):
        switchable(EXAMPLE + active.number).square().mean().backward()
    optimizer.step()
    return switchable.eval()


@pytest.mark.parametrize("shortcuts", ["shared", "conv"])
def test_a_switchable_model_comes_back_bit_for_bit(shortcuts, tmp_path):
    switchable = trained(fused(built(), EXAMPLE, (0.2, 0.5), shortcuts=shortcuts)[0])
    subnets.switch(switchable, 1)
    autogate.save(switchable, tmp_path / "switchable.safetensors")
    assert [row.active for row in subnets.status(switchable).rows] == [False, True, False]
    loaded = autogate.load(tmp_path / "switchable.safetensors")
    rows = subnets.status(loaded).rows
    assert [row.structure for row in rows] == [row.structure for row in subnets.status(switchable).rows]
    assert [row.active for row in rows] == [False, True, False]
    state = switchable.state_dict()
    assert list(loaded.state_dict()) == list(state)
    assert all(torch.equal(tensor, state[name]) for name, tensor in loaded.state_dict().items())
    for number in (1, 0, 2):
        subnets.switch(loaded, number)
        subnets.switch(switchable, number)
        assert torch.equal(loaded(EXAMPLE), switchable(EXAMPLE))
        with torch.no_grad():
            assert torch.equal(subnets.extract(loaded, number)(EXAMPLE), loaded(EXAMPLE))
    autogate.save(loaded, tmp_path / "again.safetensors")
    again = autogate.load(tmp_path / "again.safetensors")
    assert torch.equal(trained(again)(EXAMPLE), trained(loaded)(EXAMPLE))


def test_a_slim_model_with_subnets_comes_back(tmp_path):
    slim = autogate.finalize(closed(built(), EXAMPLE, 0.7, 0), warn=False)
    switchable = trained(fused(slim, EXAMPLE, (0.4,))[0])
    autogate.save(switchable, tmp_path / "switchable.safetensors")
    loaded = autogate.load(tmp_path / "switchable.safetensors")
    for number in (0, 1):
        subnets.switch(loaded, number)
        subnets.switch(switchable, number)
        assert torch.equal(loaded(EXAMPLE), switchable(EXAMPLE))


@pytest.mark.slow
def test_constants_of_emptied_branches_come_back(tmp_path):
    model, x = built("test_vit", img_size=32), EXAMPLE
    found = closed(model, x, 0.1, 0)
    switchable = subnets.fuse(copy.deepcopy(model), subnets.of(found, names=["small"]))
    subnets.switch(switchable, 0)
    assert any("branch_constant" in name for name in switchable.state_dict())
    autogate.save(switchable, tmp_path / "switchable.safetensors")
    assert torch.equal(autogate.load(tmp_path / "switchable.safetensors")(x), switchable(x))


def test_a_model_of_your_own_is_passed_and_left_alone_if_the_file_is_of_another(tmp_path):
    class Own(nn.Sequential):
        pass

    def make(width: int) -> nn.Module:
        torch.manual_seed(0)
        return Own(nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, 4, 3)).eval()

    switchable = trained(fused(make(16), EXAMPLE, (0.5,))[0])
    autogate.save(switchable, tmp_path / "own.safetensors")
    with pytest.raises(autogate.AutogateError, match="Pass the dense model"):
        autogate.load(tmp_path / "own.safetensors")
    loaded = autogate.load(tmp_path / "own.safetensors", make(16))
    subnets.switch(loaded, 0)
    subnets.switch(switchable, 0)
    assert torch.equal(loaded(EXAMPLE), switchable(EXAMPLE))
    other = make(24)
    state = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    with pytest.raises(autogate.AutogateError, match="shape"):
        autogate.load(tmp_path / "own.safetensors", other)
    assert SUBNETS not in other._modules
    assert all(torch.equal(tensor, state[name]) for name, tensor in other.state_dict().items())


def test_a_layer_that_was_exchanged_is_told_of(tmp_path):
    switchable = fused(built(), EXAMPLE, (0.5,))[0]
    switchable.fc = nn.Linear(switchable.fc.in_features, 9)
    with pytest.raises(autogate.AutogateError, match=r"fc.* when the model was fused"):
        autogate.save(switchable, tmp_path / "x.safetensors")


def test_a_model_that_is_neither_slim_nor_switchable_is_refused(tmp_path):
    with pytest.raises(autogate.AutogateError, match="no record of a slimming"):
        autogate.save(built(), tmp_path / "x.safetensors")


def test_widths_between_subnets_come_back(tmp_path):
    switchable = trained(fused(built(), EXAMPLE, (0.2, 0.5))[0])
    for share, calibrated in ((0.4, True), (0.6, False)):
        subnets.switch(switchable, flops=share, between=True)
        if calibrated:
            autogate.recalibrate(switchable, [EXAMPLE])
    autogate.save(switchable, tmp_path / "switchable.safetensors")
    loaded = autogate.load(tmp_path / "switchable.safetensors")
    assert [row.structure for row in subnets.status(loaded).rows[3:]] == [
        row.structure for row in subnets.status(switchable).rows[3:]
    ]
    assert [row.calibrated for row in subnets.status(loaded).rows[3:]] == [True, False]
    assert torch.equal(loaded(EXAMPLE), switchable(EXAMPLE))
    name = subnets.status(loaded).rows[3].structure.name
    assert subnets.switch(loaded, name) == subnets.switch(switchable, name)
    assert torch.equal(loaded(EXAMPLE), switchable(EXAMPLE))
