"""Adaptive models in other libraries' training loops: they train as in a plain loop."""

from __future__ import annotations

import lightning as L
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from autogate import adaptive
from tests.autogate.loops.small_nets import EXAMPLE, Residual, batches

BATCHES, EPOCHS, CLIP = 5, 2, 1.0


def model_that_chooses() -> nn.Module:
    torch.manual_seed(0)
    return adaptive.prepare(Residual(), EXAMPLE, flops=0.3, steps=EPOCHS * BATCHES, warmup=0.2)


def loss_of(model: nn.Module, batch: list[torch.Tensor], place: tuple[int, int]) -> torch.Tensor:
    torch.manual_seed(sum(place))  # the noise of each step
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def plainly_trained(clip: float | None) -> nn.Module:
    model = model_that_chooses().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for epoch in range(EPOCHS):
        for index, batch in enumerate(batches(BATCHES)):
            optimizer.zero_grad()
            loss_of(model, batch, (epoch, index)).backward()
            if clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
    return model


def assert_same(model: nn.Module, wanted: nn.Module) -> None:
    assert int(adaptive.bank(wanted).step_count) == EPOCHS * BATCHES and float(adaptive.bank(wanted).threshold) != 0
    state = wanted.state_dict()
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


class Classifier(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.network = model_that_chooses()

    def training_step(self, batch, index):
        return loss_of(self.network, batch, (self.current_epoch, index))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_lightning_trains_as_a_plain_loop_and_resumes(tmp_path):
    def fit(epochs: int, **options) -> nn.Module:
        saves = ModelCheckpoint(tmp_path, save_top_k=-1, filename="{epoch}")
        trainer = L.Trainer(
            default_root_dir=tmp_path, accelerator="cpu", devices=1, max_epochs=epochs, logger=False,
            callbacks=[saves], enable_progress_bar=False, enable_model_summary=False, gradient_clip_val=CLIP,
        )  # fmt: skip
        module = Classifier()
        trainer.fit(module, batches(BATCHES), **options)
        return module.network

    wanted = plainly_trained(CLIP)
    assert_same(fit(EPOCHS), wanted)
    assert_same(fit(EPOCHS, ckpt_path=str(tmp_path / "epoch=0.ckpt")), wanted)


def test_accelerate_trains_as_a_plain_loop():
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        accelerator = Accelerator(cpu=True)
        model = model_that_chooses().train()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        model, optimizer, loader = accelerator.prepare(model, optimizer, batches(BATCHES))
        for epoch in range(EPOCHS):
            for index, batch in enumerate(loader):
                optimizer.zero_grad()
                accelerator.backward(loss_of(model, batch, (epoch, index)))
                optimizer.step()
        assert_same(accelerator.unwrap_model(model), plainly_trained(None))
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
