"""A training run by Lightning's Trainer."""

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, LambdaCallback, ModelCheckpoint, WeightAveraging
from torch import nn

import autogate
from tests.autogate.loops.small_nets import EXAMPLE, Residual, batches

EPOCHS, BATCHES, ACCUMULATED = 3, 20, 2
STEPS = EPOCHS * BATCHES // ACCUMULATED


class Classifier(L.LightningModule):
    """Holds the gated network, or is gated itself."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, images):
        return self.network(images)

    def training_step(self, batch, index):
        images, labels = batch
        return nn.functional.cross_entropy(self.network(images), labels)

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def classifier() -> Classifier:
    torch.manual_seed(0)
    return Classifier(autogate.prepare(Residual(), EXAMPLE, flops=0.5, steps=STEPS))


def trainer(folder, *callbacks, **options) -> L.Trainer:
    checkpoints = any(isinstance(callback, ModelCheckpoint) for callback in callbacks)
    return L.Trainer(
        default_root_dir=folder, accelerator="cpu", devices=1, max_epochs=EPOCHS, logger=False, callbacks=[*callbacks],
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=checkpoints, **options,
    )  # fmt: skip


MIXED = {"accumulate_grad_batches": ACCUMULATED, "gradient_clip_val": 1.0, "precision": "bf16-mixed"}


def assert_same_state(model: nn.Module, wanted: nn.Module) -> None:
    state = model.state_dict()
    for name, value in wanted.state_dict().items():
        assert torch.equal(state[name], value), name


@pytest.mark.filterwarnings("ignore")
def test_a_trainers_run_is_the_plain_loops_and_resumes_exactly(tmp_path):
    every_epoch = ModelCheckpoint(tmp_path, save_top_k=-1, filename="{epoch}")
    whole = classifier()
    trainer(tmp_path, every_epoch, **MIXED).fit(whole, batches(BATCHES))
    progress = autogate.gates(whole.network).progress()
    assert progress.step == STEPS and progress.settled and progress.dead

    resumed = classifier()
    trainer(tmp_path, **MIXED).fit(resumed, batches(BATCHES), ckpt_path=tmp_path / "epoch=0.ckpt")
    assert_same_state(resumed, whole)

    plain = classifier()
    settings = plain.configure_optimizers()
    optimizer, schedule = settings["optimizer"], settings["lr_scheduler"]["scheduler"]
    for _ in range(EPOCHS):
        for index, batch in enumerate(batches(BATCHES)):
            with torch.autocast("cpu", torch.bfloat16):
                loss = plain.training_step(batch, index) / ACCUMULATED
            loss.backward()
            if index % ACCUMULATED == ACCUMULATED - 1:
                nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
    assert_same_state(plain, whole)

    with torch.no_grad():
        gated = whole.eval()(EXAMPLE)
        slim = autogate.finalize(whole.network)
        assert slim is whole.network and slim.head.in_features < 16
        torch.testing.assert_close(whole(EXAMPLE), gated, rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore")
def test_a_lightning_module_can_be_gated_itself(tmp_path):
    torch.manual_seed(0)
    model = autogate.prepare(Classifier(Residual()), EXAMPLE, flops=0.5, steps=STEPS)
    trainer(tmp_path, max_steps=STEPS).fit(model, batches(BATCHES))
    with torch.no_grad():
        gated = model.eval()(EXAMPLE)
        slim = autogate.finalize(model)
        assert slim is model and type(slim) is Classifier and slim.network.head.in_features < 16
        torch.testing.assert_close(slim(EXAMPLE), gated, rtol=1e-5, atol=1e-6)
    trainer(tmp_path).fit(slim, batches(BATCHES))


@pytest.mark.filterwarnings("ignore")
def test_a_trainer_goes_on_with_the_slim_network(tmp_path):
    class Slimming(L.Callback):
        """As soon as the targets are met; `pl_module.optimizers()` is a wrapper of Lightning's."""

        def on_train_epoch_end(self, trainer, pl_module):
            if trainer.current_epoch == EPOCHS - 2:
                assert autogate.gates(pl_module.network).progress().settled
                autogate.finalize(pl_module.network, optimizer=pl_module.optimizers())

    whole, parts = classifier(), classifier()
    trainer(tmp_path).fit(whole, batches(BATCHES))
    fitting = trainer(tmp_path, Slimming())
    fitting.fit(parts, batches(BATCHES))
    momentum = fitting.optimizers[0].state[parts.network.head.weight]["momentum_buffer"]
    assert momentum.shape == parts.network.head.weight.shape == (4, parts.network.head.in_features) != (4, 16)
    slim = autogate.finalize(whole.network)
    torch.testing.assert_close(dict(parts.network.state_dict()), dict(slim.state_dict()), rtol=1e-4, atol=1e-5)


def test_asked_for_the_gates_of_the_module_around_it_names_the_network():
    with pytest.raises(autogate.AutogateError, match="Pass its 'network'"):
        autogate.finalize(classifier())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("average", [EMAWeightAveraging(decay=0.9), WeightAveraging()], ids=["EMA", "SWA"])
def test_averaged_weights_keep_the_dead(average, tmp_path):
    """Both average buffers too, as they come, and put the average in the model's place at the end."""
    model, seen = classifier(), []
    watch = LambdaCallback(on_train_batch_end=lambda *_: seen.append(autogate.gates(model.network).live))
    trainer(tmp_path, average, watch).fit(model, batches(BATCHES))
    bank = autogate.gates(model.network)
    assert not seen[-1].all() and torch.equal(bank.live, seen[-1])
    assert abs(bank.shares()["FLOPs"] - 0.5) <= 0.01
    autogate.finalize(model.network)
