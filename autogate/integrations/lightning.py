"""A callback for Lightning's Trainer: gates before the run, the slim network as soon as the targets are met.

    trainer = L.Trainer(callbacks=[GateCallback(network="network", example_inputs=example, flops=0.5, steps=steps)])
    trainer.fit(classifier, loader)

A checkpoint that was saved after the network was slimmed holds other shapes than the module that resumes. So the
callback keeps a record of the slimming in its own state. Lightning hands that to a callback only after it has loaded
the weights. The module's own `on_load_checkpoint` comes before, so the callback listens in there.
"""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from torch import nn

from autogate.api import finalize, finalize_as, gates, prepare
from autogate.gating import BANK
from autogate.slim import history_of, slimming_from_json, slimming_to_json
from rewriters import AutogateError


class GateCallback(Callback):
    """Prepares a LightningModule's network, and finalizes it at the end of the epoch in which the targets are met.

    The optimizers continue with the slim network. Checkpoints from before and after resume with `ckpt_path=`, also in
    `validate`, `test` and `predict`. If the targets are not met at the end, the network keeps its gates: call
    `autogate.finalize`.

    In a run of several processes, or with a callback that averages weights, the network is finalized at the end of
    `fit`, because the wrapper around it and the average hold its shapes.

    Args:
        network: path of the network within the LightningModule; the whole LightningModule if empty.
        example_inputs: as for `autogate.prepare`.
        steps: number of optimizer steps. The Trainer's estimate if None.
        budget: the other arguments of `autogate.prepare`, such as `flops=0.5`. Convolutions on shortcuts need
            nothing: Lightning builds the optimizer after this callback has prepared the network.

    Raises:
        AutogateError: the LightningModule has no such network, or prepare refuses it (see `autogate.prepare`).
    """

    def __init__(self, network: str = "", example_inputs: Any = None, *, steps: int | None = None, **budget: Any):
        self.network = network
        self.example_inputs = example_inputs
        self.steps = steps
        self.budget = budget
        self._slimming: str | None = None

    @property
    def state_key(self) -> str:
        return f"autogate.GateCallback({self.network!r})"

    def state_dict(self) -> dict[str, Any]:
        """The record of the slimming; without it while the network has gates."""
        return {"slimming": self._slimming}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._slimming = state_dict["slimming"]

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Prepare the network, and get ready to slim it if the checkpoint to come is of a slim one."""
        if stage == "fit":
            self._prepare(trainer, pl_module)
        own = pl_module.on_load_checkpoint

        def before_the_weights(checkpoint: dict[str, Any]) -> None:
            self._take_form(trainer, pl_module, checkpoint)
            own(checkpoint)

        pl_module.on_load_checkpoint = before_the_weights  # type: ignore[method-assign]

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the LightningModule's hook as it was."""
        pl_module.__dict__.pop("on_load_checkpoint", None)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Finalize, if the targets are met and nothing around the network holds its shapes."""
        averages = any(isinstance(one, WeightAveraging) for one in trainer.callbacks)  # type: ignore[attr-defined]
        if trainer.world_size == 1 and not averages:
            self._finalize_if_settled(trainer, pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Finalize, if the targets are met."""
        self._finalize_if_settled(trainer, pl_module)

    def _finalize_if_settled(self, trainer: Trainer, pl_module: LightningModule) -> None:
        network = self._network(pl_module)
        if BANK not in network._modules or not gates(network).progress().settled:
            return
        finalize(network, optimizer=trainer.optimizers)
        history = history_of(network)
        assert history is not None
        self._slimming = slimming_to_json(history.slimmings[-1])

    def _prepare(self, trainer: Trainer, pl_module: LightningModule) -> None:
        network = self._network(pl_module)
        if history_of(network) is None and BANK not in network._modules:
            steps = self.steps
            if steps is None and trainer.state.fn == "fit":
                steps = int(trainer.estimated_stepping_batches)
            prepare(network, self.example_inputs, steps=steps, **self.budget)

    def _take_form(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Give the network the form, gated or slim, that it has in the checkpoint."""
        found = checkpoint.get("callbacks", {}).get(self.state_key)
        if found is None:
            return
        self._prepare(trainer, pl_module)
        network = self._network(pl_module)
        if found["slimming"] is not None and BANK in network._modules:
            finalize_as(network, slimming_from_json(found["slimming"]))

    def _network(self, pl_module: LightningModule) -> nn.Module:
        try:
            return pl_module.get_submodule(self.network)
        except AttributeError as error:
            paths = [path for path, _ in pl_module.named_children()]
            raise AutogateError(
                f"it has no module {self.network!r}.",
                where=type(pl_module).__name__,
                remedy=f"Give GateCallback(network=...) the path of its network. Its own modules are {paths}.",
            ) from error
