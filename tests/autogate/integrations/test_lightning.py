"""GateCallback: prepares, finalizes once the targets are met, and resumes on both sides of that."""

from __future__ import annotations

from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from torch import nn

import autogate
from autogate.integrations.lightning import GateCallback
from autogate.slim import history_of
from tests.autogate.loops.small_nets import EXAMPLE, Residual, batches

EPOCHS, BATCHES = 4, 20


class Classifier(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.network = Residual()

    def training_step(self, batch, index):
        images, labels = batch
        return nn.functional.cross_entropy(self.network(images), labels)

    def validation_step(self, batch, index):
        self.training_step(batch, index)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


def trainer(folder: Path, *callbacks: L.Callback, epochs: int = EPOCHS, **options) -> L.Trainer:
    gates = GateCallback("network", EXAMPLE, flops=0.5, **options)
    return L.Trainer(
        default_root_dir=folder, accelerator="cpu", devices=1, max_epochs=epochs, logger=False,
        callbacks=[gates, *callbacks], enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=any(isinstance(one, ModelCheckpoint) for one in callbacks),
    )  # fmt: skip


pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module", params=["shared", "conv"])
def whole(request, tmp_path_factory) -> tuple[Classifier, Path, str]:
    """A run that was never stopped, the folder of its checkpoints, and its shortcuts."""
    folder, model = tmp_path_factory.mktemp("run"), Classifier()
    every_epoch = ModelCheckpoint(folder, save_top_k=-1, filename="{epoch}")
    trainer(folder, every_epoch, shortcuts=request.param).fit(model, batches(BATCHES))
    return model, folder, request.param


def test_the_network_is_slim_once_the_targets_are_met(whole):
    model, folder, _ = whole
    assert history_of(model.network) is not None and model.network.stem[0].out_channels < 16
    gated = ["network.autogate.alpha" in torch.load(folder / f"epoch={epoch}.ckpt", weights_only=False)["state_dict"]
             for epoch in range(EPOCHS)]  # fmt: skip
    assert gated[0] and not gated[-1] and gated == sorted(gated, reverse=True)


@pytest.mark.parametrize("epoch", range(EPOCHS - 1))
def test_a_checkpoint_of_any_epoch_resumes(epoch, whole, tmp_path):
    model, folder, shortcuts = whole
    again = Classifier()
    trainer(tmp_path, shortcuts=shortcuts).fit(again, batches(BATCHES), ckpt_path=folder / f"epoch={epoch}.ckpt")
    state = again.state_dict()
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())


def test_a_slim_checkpoint_is_validated(whole, tmp_path):
    model, folder, shortcuts = whole
    again = Classifier()
    with_gates = trainer(tmp_path, shortcuts=shortcuts)
    with_gates.validate(again, batches(2), ckpt_path=folder / f"epoch={EPOCHS - 1}.ckpt", verbose=False)
    assert torch.equal(again.network.head.weight, model.network.head.weight)


def test_an_average_of_the_weights_puts_it_off_to_the_end(tmp_path):
    model, average = Classifier(), EMAWeightAveraging(decay=0.9)
    trainer(tmp_path, average).fit(model, batches(BATCHES))
    assert history_of(model.network) is not None and model.network.head.in_features < 16


def test_gates_stay_where_the_targets_are_not_met(tmp_path):
    model = Classifier()
    trainer(tmp_path, epochs=1, steps=100).fit(model, batches(5))
    assert autogate.gates(model.network).progress().step == 5
    trainer(tmp_path, epochs=1, steps=100).fit(model, batches(5))
    assert autogate.gates(model.network).progress().step > 5


def test_a_network_that_is_not_there(tmp_path):
    with pytest.raises(autogate.AutogateError, match=r"no module 'backbone'.*\['network'\]"):
        L.Trainer(
            accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
            callbacks=[GateCallback("backbone", EXAMPLE)],
        ).fit(Classifier(), batches(1))  # fmt: skip
