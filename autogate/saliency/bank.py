"""The saliency bank: what the saliency modules of a model have in common, from step to step.

A child of the model. It notes what each forward costs, steers the penalty to the budget, and keeps the model's own
weights as they are while the modules warm up. Optimizers reach it as they reach a gate bank.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from autogate.gating import hooks
from autogate.naming import tell_of_missing
from autogate.saliency.counting import Cost, Counting, MeanUse, Notes
from autogate.saliency.module import NAME, SaliencyModule
from autogate.saliency.run import Run, RunState
from autogate.slim import Form, PrepareRecord
from autogate.wrappers import child_of
from rewriters import AutogateError, UndoLog

SALIENCY = "autogate_saliency"
"""Name of the model's child that is its saliency bank."""


class SaliencyBank(nn.Module):
    """What the saliency modules of a model have in common.

    Args:
        model: the model; the bank follows its forwards and optimizers.
        modules: by the path of their layers.
        counting: how its forwards are counted.
        notes: takes their calls.
        run: the course of the training.
        origin: how the model was analysed.
        handles: of the modules' hooks.
        form: of the model without them.

    Attributes:
        step_count: 0-dim float64, optimizer steps taken.
        cost: 0-dim float64, the running mean of the share of the FLOPs that an image takes; above 0 from the first
            step.
        integral: 0-dim float64, the controller's memory.
        threshold: 0-dim float64, what `SaliencyModule.decisive` of a score must exceed for its channel to be computed.
        balance: 0-dim float64, lambda of the latest step (equation 10).
        layout: 0-dim float64, a checksum: the state of another model is refused.
        measured: the use that was measured last, and the state that the run was in.
    """

    step_count: Tensor
    cost: Tensor
    integral: Tensor
    threshold: Tensor
    balance: Tensor
    layout: Tensor

    def __init__(
        self, model: nn.Module, modules: Mapping[str, SaliencyModule], counting: Counting, notes: Notes, run: Run,
        origin: PrepareRecord, handles: Sequence[RemovableHandle], form: Form,
    ):  # fmt: skip
        super().__init__()
        for name in ("step_count", "cost", "integral", "threshold", "balance"):
            self.register_buffer(name, torch.zeros((), dtype=torch.float64))
        self.counting, self.notes, self.run, self.origin, self.form = counting, notes, run, origin, form
        self._checksum = counting.checksum()
        self.register_buffer("layout", torch.tensor(float(self._checksum), dtype=torch.float64))
        self.paths, self.saliency_modules = tuple(modules), tuple(modules.values())
        self._model = (model,)  # in a tuple: it is no child of its child
        before = model.register_forward_pre_hook(self._before_forward)
        after = model.register_forward_hook(self._after_forward, always_call=True)
        self.handles = [*handles, before, after]
        self.measured: tuple[RunState, MeanUse] | None = None
        self._begin()
        self.to(next(self.saliency_modules[0].parameters()).device)
        self._write()

    def _begin(self) -> None:
        self._optimizer: Optimizer | None = None
        self._steps_without_modules = 0
        hooks.register(self)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_optimizer": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._begin()

    def forward(self, x: Any = None) -> Any:
        """Return `x`: a `nn.Sequential` runs all of its children."""
        return x

    @property
    def added(self) -> tuple[str, ...]:
        """Paths of the modules that the model was given."""
        owners = [layer.path for layer in self.counting.layers if layer.scaling is not None]
        return (*(f"{path}.{NAME}".lstrip(".") for path in owners), SALIENCY)

    def detach(self) -> None:
        """End the bank's life: its hooks and those of its modules are gone. The modules are left to an `UndoLog`."""
        hooks.unregister(self)
        for handle in self.handles:
            handle.remove()

    def cost_of_images(self) -> Cost:
        """What the latest forward has cost.

        Raises:
            AutogateError: there was none, or scores are NaN or infinite.
        """
        if not self.notes.has_scores:
            raise AutogateError(
                "no forward has run since it was prepared, copied or loaded.",
                where=type(self._model[0]).__name__,
                remedy="Run model(images) first.",
            )
        return self.counting.cost(self.notes.calls)

    def keep(self, use: MeanUse) -> None:
        """Keep what was measured of the model as it is now."""
        self.measured = (self._state(), use)

    @property
    def kept(self) -> MeanUse | None:
        """What was measured last; None if the run has gone on since, or the threshold is another."""
        state, use = self.measured or (None, None)
        return use if state == self._state() else None

    @torch.compiler.disable
    def _before_forward(self, model: nn.Module, args: Any) -> None:
        self.notes.begin()

    @torch.compiler.disable
    def _after_forward(self, model: nn.Module, args: Any, output: Any) -> None:
        self.notes.end()

    def kernels(self) -> list[nn.Parameter]:
        """The modules' parameters: an optimizer that has them moves the run on."""
        return [parameter for module in self.saliency_modules for parameter in module.parameters()]

    def parameters_of_model(self) -> list[nn.Parameter]:
        """All parameters of the model."""
        return list(self._model[0].parameters())

    def about_to_step(self, optimizer: Optimizer) -> None:
        """Before an optimizer's step: while the modules warm up, it doesn't see the other gradients."""
        self._optimizer = optimizer
        own = set(map(id, self.kernels()))
        if not any(id(weight) in own for group in optimizer.param_groups for weight in group["params"]):
            self._warn_without_modules()
        self.read()

    def _warn_without_modules(self) -> None:
        self._steps_without_modules += 1
        if self._steps_without_modules == 2 and not self.step_count:
            warnings.warn(
                "the optimizer has none of the saliency modules' parameters: it was built before "
                "autogate.adaptive.prepare, which adds them. Build it afterwards.",
                stacklevel=5,
            )

    def measure(self, *, scale: Tensor | float | None = None, later: bool = False) -> None:
        """Before the step: nothing is to be read from gradients."""

    def read(self) -> None:
        """After a closure within the step has computed gradients, or before a step without one."""
        if self._optimizer is None or not self.warms_up:
            return
        own, mine = set(map(id, self.kernels())), set(map(id, self.parameters_of_model()))
        for group in self._optimizer.param_groups:
            for weight in group["params"]:
                if id(weight) in mine and id(weight) not in own:
                    weight.grad = None

    def discard(self) -> None:
        """The optimizer has skipped its step."""

    def fold(self, stepped: bool = False) -> None:
        """Another optimizer has stepped."""

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """After the step: measure the mean cost, and steer the penalty by it."""
        if not lr or not self.notes.has_scores:
            return
        found = self.cost_of_images()
        after = self.run.step(self._state(), float(found.images.mean()) / found.dense)
        for buffer, value in zip((self.step_count, self.cost, self.integral, self.threshold), after, strict=True):
            buffer.fill_(value)
        self._write()

    @torch.no_grad()
    def set_threshold(self, value: float) -> None:
        """Set what the decisive value of a score must exceed for its channel to be computed."""
        self.threshold.fill_(value)
        for module in self.saliency_modules:
            module.threshold.fill_(value)

    def _state(self) -> RunState:
        steps, *rest = torch.stack([self.step_count, self.cost, self.integral, self.threshold]).tolist()
        return RunState(int(steps), *rest)

    @torch.no_grad()
    def _write(self) -> None:
        """Give the modules what they need for the next step."""
        outputs = torch.tensor([float(module.expand.out_features) for module in self.saliency_modules])
        levels = torch.stack([module.level for module in self.saliency_modules]).float().cpu()
        level = float(levels.square().mul(outputs).sum().div(outputs.sum()).sqrt())
        dose = self.run.dose(self._state(), level, int(outputs.sum()))
        self.balance.fill_(dose.push * float(outputs.sum()))
        for module in self.saliency_modules:
            for buffer, value in zip((module.push, module.noise, module.soft, module.threshold), dose, strict=True):
                buffer.fill_(value)

    def recount(self, counting: Counting, undo_log: UndoLog) -> None:
        """Count forwards in another way: channels of the model have gone."""
        undo_log.set_attribute(self, "counting", counting)
        undo_log.set_attribute(self, "measured", None)
        undo_log.set_attribute(self, "_checksum", counting.checksum())
        undo_log.write(self.layout, torch.tensor(float(self._checksum)))

    @property
    def warms_up(self) -> bool:
        """Whether only the modules train."""
        return int(self.step_count) < self.run.warm_steps

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: Any, strict: bool, missing_keys: list[str],
        unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:  # fmt: skip
        layout = state_dict.get(f"{prefix}layout")
        if layout is not None and not abs(float(layout) - self._checksum) < 0.5:
            wrong = (
                "these saliency modules belong to another model, or to this one prepared in another way. Prepare it as "
                "for the checkpoint's run."
            )
            error_msgs.append(f"{prefix.rstrip('.')}: {wrong}")
            return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if layout is None:
            remark = (
                "this model has saliency modules, and the state has none. Load a dense state before "
                "autogate.adaptive.prepare"
            )
            tell_of_missing(missing_keys, error_msgs, f"{prefix}step_count", remark)

    def _apply(self, fn: Any, recurse: bool = True) -> SaliencyBank:
        before = dict(self.named_buffers())  # half() is for the model's numbers
        super()._apply(fn, recurse)
        for name, buffer in self.named_buffers():
            if buffer.dtype != before[name].dtype:
                setattr(self, name, before[name].to(buffer.device))
        return self

    def __repr__(self) -> str:
        left = f"FLOPs {float(self.cost) or 1.0:.3f} -> {self.run.flops:.3f}"
        steps = f"step {int(self.step_count)} of {self.run.steps}"
        return f"SaliencyBank({len(self.saliency_modules)} layers, {left}, {steps})"


def saliency_of(model: object) -> SaliencyBank | None:
    """The saliency bank of a model; None if it has none."""
    found = child_of(model, SALIENCY)
    return found if isinstance(found, SaliencyBank) else None


def check_not_adaptive(model: object) -> None:
    """Raise if a model chooses its channels for each image.

    Raises:
        AutogateError: it does.
    """
    if saliency_of(model) is not None:
        raise AutogateError(
            "it has saliency modules: it chooses its channels for each image.",
            where=type(model).__name__,
            remedy="Its verbs are in autogate.adaptive, and autogate.summary tells what it uses. For gates start from "
            "a model without saliency modules.",
        )
