"""Switchable networks in other libraries' training loops: they train as in a plain loop."""

from __future__ import annotations

import copy

import lightning as L
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from autogate import subnets
from tests.autogate.loops.small_nets import EXAMPLE, Residual, batches

BATCHES = 4


def switchable() -> nn.Module:
    torch.manual_seed(0)
    model = Residual()
    return subnets.fuse(model, subnets.find(model, EXAMPLE, flops=(0.4, 0.7), by="l2"))


def loss_of(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(model(images), labels)


def plainly_trained(epochs: int) -> nn.Module:
    model = switchable().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for _ in range(epochs):
        for images, labels in batches(BATCHES):
            optimizer.zero_grad()
            for _ in subnets.each(model):
                loss_of(model, images, labels).backward()
            optimizer.step()
    return model


def assert_same(model: nn.Module, wanted: nn.Module) -> None:
    state = wanted.state_dict()
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


class Classifier(L.LightningModule):
    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network
        self.automatic_optimization = False

    def training_step(self, batch, index):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        for _ in subnets.each(self.network):
            self.manual_backward(loss_of(self.network, *batch))
        optimizer.step()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_lightning_trains_as_a_plain_loop_and_resumes(tmp_path):
    def fit(module: Classifier, epochs: int, **options) -> None:
        saves = ModelCheckpoint(tmp_path, save_top_k=-1, filename="{epoch}")
        trainer = L.Trainer(
            default_root_dir=tmp_path, accelerator="cpu", devices=1, max_epochs=epochs, logger=False,
            callbacks=[saves], enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        trainer.fit(module, batches(BATCHES), **options)

    whole = Classifier(switchable())
    fit(whole, 2)
    assert_same(whole.network, plainly_trained(2))
    resumed = Classifier(switchable())
    fit(resumed, 2, ckpt_path=str(tmp_path / "epoch=0.ckpt"))
    assert_same(resumed.network, whole.network)


def test_accelerate_trains_as_a_plain_loop():
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        accelerator = Accelerator(cpu=True)
        model = switchable()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        model, optimizer, loader = accelerator.prepare(model, optimizer, batches(BATCHES))
        for images, labels in loader:
            optimizer.zero_grad()
            for _ in subnets.each(model.train()):
                accelerator.backward(loss_of(model, images, labels))
            optimizer.step()
        assert_same(accelerator.unwrap_model(model), plainly_trained(1))
        subnets.switch(model, 0)
        copied = copy.deepcopy(accelerator.unwrap_model(model)).eval()
        with torch.no_grad():
            assert torch.equal(copied(EXAMPLE), accelerator.unwrap_model(model).eval()(EXAMPLE))
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
