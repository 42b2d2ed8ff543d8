"""What a training loop may do: gradient checkpointing, accumulation, autocast, clipping, frozen layers, fine-tuning."""

import copy
import warnings

import pytest
import timm
import torch
from torch import nn

import autogate
from tests.autogate.loops.training import assert_exact, loss_of, net, train
from tests.slow import slow_but


def test_gradient_checkpointing_changes_nothing():
    plain, _ = net(flops=0.5, steps=20)
    saving, example = net(flops=0.5, steps=20)
    saving.set_grad_checkpointing(True)
    for model in (plain, saving):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            train(model, 20)
    torch.testing.assert_close(autogate.gates(saving).alpha, autogate.gates(plain).alpha, rtol=1e-3, atol=1e-5)
    assert_exact(saving, example)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad", "ignore:torch.utils.checkpoint")
@pytest.mark.parametrize("name", slow_but(["test_convnext"], ["test_vit", "test_efficientnet", "test_convnext"]))
def test_a_model_that_saves_memory_already_is_prepared(name):
    """Its own forward is traced, and PyTorch's C++ is given what passes through the checkpoints."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=4, **({"img_size": 32} if "vit" in name else {})).eval()
    plain = autogate.prepare(copy.deepcopy(model), example := torch.randn(2, 3, 32, 32))
    model.set_grad_checkpointing(True)
    model = autogate.prepare(model, example)
    assert autogate.gates(model).channel_map.checksum() == autogate.gates(plain).channel_map.checksum()
    with torch.no_grad():
        autogate.gates(model).alpha[::2] = 0
    loss_of(model.train(), 0).backward()
    assert_exact(model, example)


@pytest.mark.parametrize("clip", ["norm", pytest.param("value", marks=pytest.mark.slow)])
def test_accumulation_autocast_clipping_and_channels_last(clip):
    model, example = net(flops=0.5, steps=40)
    model = model.to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for step in range(40):
        model.train()
        optimizer.zero_grad()
        for part in range(2):
            with torch.autocast("cpu", torch.bfloat16):
                loss = loss_of(model, 2 * step + part, size=4) / 2
            loss.backward()
        if clip == "norm":
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        else:
            nn.utils.clip_grad_value_(model.parameters(), 0.1)
        optimizer.step()
    progress = autogate.gates(model).progress()
    assert progress.step == 40 and abs(progress.shares["FLOPs"] - 0.5) <= 0.01
    assert_exact(model, example)


def test_a_frozen_backbone_is_gated_and_otherwise_left_alone():
    model, example = net(flops=0.7, steps=40)
    bank = autogate.gates(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(("layer4", "fc")))
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.05)
    sides = [side for side in bank.channel_map.gated if not model.get_parameter(side.tensor).requires_grad]
    assert sides
    before = {side: (model.get_parameter(side.tensor).clone(), _along(bank.folded, bank, side)) for side in sides}
    for step in range(40):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()
    assert bank.progress().settled
    for side, (weight, gate) in before.items():
        wanted = weight / gate * _along(bank.folded, bank, side)
        torch.testing.assert_close(model.get_parameter(side.tensor).detach(), wanted, rtol=1e-4, atol=1e-7)
    assert_exact(model, example)


def _along(values: torch.Tensor, bank: autogate.GateBank, side) -> torch.Tensor:
    """A value per class, laid out along the side of a kernel that broadcasts to the kernel; 1 for pinned channels."""
    flat = torch.cat([values, torch.ones(1)])[bank.channel_map.classes[side]]
    return flat.view([-1 if dim == side.dim else 1 for dim in range(4)])


def test_training_on_after_the_steps_is_plain_fine_tuning():
    model, example = net(flops=0.5, steps=30)
    train(model, 30)
    bank = autogate.gates(model)
    live, alpha = bank.live.clone(), bank.alpha.clone()
    train(model, 10)
    assert torch.equal(bank.live, live) and torch.equal(bank.alpha, alpha)
    assert bank.progress().step == 30
    assert_exact(model, example)
