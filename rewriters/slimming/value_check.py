"""Compare values before training: slim the live model for a trial pattern, run it, compare it with the gated one.

The dry run shows that a slim model runs; this shows that it computes the same. A random half of the classes is dead.
Weights that must die are zero in copies, and all is undone. What differs by more than rounding is told apart in float64
and then bisected to the module whose code makes the first value that differs.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_map_only

from rewriters.analysis import Analysis, pin_call, samples_in, trial_pattern
from rewriters.cross_channel import write_live
from rewriters.errors import AutogateError
from rewriters.interrupts import let_signals_in
from rewriters.labelling import ChannelMap
from rewriters.outputs import EXACT_IN_FLOAT64, PLAINLY, TOLERANCE, Outputs, rounding_errors
from rewriters.recording import (
    RunningModules,
    attributes_preserved,
    collect,
    modules_of,
    named_tensors,
    set_modes,
    tensors_of,
)
from rewriters.slimming.first_difference import ValuesOfModules
from rewriters.slimming.plan import SlimPlan, apply, plan
from rewriters.slimming.trial_inputs import Inputs, share_of, smaller_inputs
from rewriters.slimming.trial_weights import put_trial_weights
from rewriters.undo_log import UndoLog

_SEED = 3

_SECONDS, _PER_SECOND = 10.0, 2e10
"""The longest run of a model that is worth it before training, and multiply-adds that a processor core does."""

_MOST_PARAMETERS = 500_000_000
"""Copies of the kernels of larger models may not fit into memory."""


@dataclass(frozen=True)
class Refused:
    """A module whose channels are kept because its slim forward gave other values.

    Attributes:
        path: the module.
        reason: what was wrong.
        whole: whether all that is in the module is kept, and not only what its own forward touches.
    """

    path: str
    reason: str
    whole: bool = False


@dataclass(frozen=True)
class Checked:
    """What a check of values found.

    Attributes:
        compared: whether values could be compared.
        refused: the first module whose slim forward gave other values; None if none did.
    """

    compared: bool
    refused: Refused | None = None

    @property
    def fine(self) -> bool:
        return self.compared and self.refused is None


@dataclass(frozen=True)
class _Compared:
    """How far the slim model's outputs are off, which module's code made the first value that is, and why."""

    error: float
    path: str | None = None
    reason: str = ""


def pin_refused(analysis: Analysis, refused: Iterable[Refused], samples: int) -> None:
    """Pin the channels of modules that an earlier check of values found; costs are for one of `samples`."""
    for one in refused:
        pin_call(analysis, one.path, one.reason)
        if one.whole:
            under = f"{one.path}." if one.path else ""
            names = {side.tensor for side in analysis.labelling.space.blocks}
            analysis.labelling.pin_tensors([name for name in names if name.startswith(under)], one.reason)
    analysis.settle(samples)


def check_values(
    model: nn.Module, analysis: Analysis, examples: Sequence[Inputs], known: Sequence[Refused] = ()
) -> Checked:
    """Find the first module whose slim forward gives other values than the gated one.

    Nothing is compared if tensors have no values (on the meta device), or if one run would take too long.

    Args:
        model: as it was analysed, with its statistics over live channels placed. It and all generators of random
            numbers are afterwards as before.
        analysis: of that model.
        examples: the example inputs that it was analysed with, by position and by name.
        known: what was found before, and is pinned in `analysis`.
    """
    if not analysis.channel_map.size or _too_large(model) or not _has_values(model, examples):
        return Checked(compared=False)
    trial, compared = _Trial(model, analysis), True
    for training in (False, True) if analysis.trains_otherwise else (False,):
        for number, example in enumerate(examples):
            let_signals_in()
            found = trial.found(number, example, training)
            if trial.plan is not None and trial.plan.forwards:
                collect()
            if found is not None and found.reason:
                return Checked(True, _escalated(found.path or "", found.reason, known))
            compared &= found is not None or training  # a forward may want targets to train
    return Checked(compared)


def _escalated(path: str, reason: str, known: Sequence[Refused]) -> Refused:
    """Pin a module's own forward first, then all in it, then its parent."""
    pinned = {(one.path, one.whole) for one in known}
    while (path, False) in pinned:
        if (path, True) not in pinned:
            return Refused(path, reason, whole=True)
        if not path:
            raise AutogateError(
                f"the slim model would compute something else ({reason}).", remedy="Please report the model."
            )
        path = path.rpartition(".")[0]
    return Refused(path, reason)


def _too_large(model: nn.Module) -> bool:
    parameters = (tensor for tensor in named_tensors(model).values() if isinstance(tensor, nn.Parameter))
    return sum(parameter.numel() for parameter in parameters) > _MOST_PARAMETERS


def _has_values(model: nn.Module, examples: Sequence[Inputs]) -> bool:
    tensors = [*named_tensors(model).values(), *tensors_of(tuple(examples))]
    return not any(tensor.is_meta or isinstance(tensor, FakeTensor) for tensor in tensors)


def _pattern(channel_map: ChannelMap) -> Tensor:
    """Half of the classes at random, but some and not all of each group: no branch is dead."""
    live = trial_pattern(channel_map.size, _SEED).numpy()
    for group in channel_map.groups():
        classes = list(group.classes)
        if live[classes].all():
            live[classes[len(classes) // 2]] = False
    return channel_map.survivors(torch.from_numpy(live))


class _Trial:
    """Compares a model, slimmed for a trial pattern, with the gated one."""

    def __init__(self, model: nn.Module, analysis: Analysis):
        self.model, self.analysis, self.number, self.training = model, analysis, 0, False
        self.plan: SlimPlan | None = None
        channel_map = analysis.channel_map
        self.live = _pattern(channel_map)
        everything = torch.ones_like(self.live)
        self.macs = sum(channel_map.macs(kernel, everything) for kernel in channel_map.kernels)

    def found(self, number: int, example: Inputs, training: bool) -> _Compared | None:
        """What differs by more than rounding for an example, if anything; None if nothing could be compared."""
        self.number, self.training = number, training
        macs = self.macs * samples_in(*example)
        for inputs in smaller_inputs(*example, most_samples=None if training else 1):
            if macs * share_of(inputs, example) > _SECONDS * _PER_SECOND:
                return None
            try:
                return self._found(inputs)
            except _DoesNotRunError:
                continue
        return None

    def _found(self, inputs: Inputs) -> _Compared:
        types = {t.dtype for t in named_tensors(self.model).values() if isinstance(t, nn.Parameter)}
        allowed = max((TOLERANCE.get(dtype, 0.0) for dtype in types), default=0.0)
        first = self._compared(inputs, allowed)
        if first.error <= allowed or first.reason:
            return first
        try:
            return self._compared(inputs, EXACT_IN_FLOAT64, in_float64=True)
        except _DoesNotRunError:
            return self._compared(inputs, PLAINLY, bisect=True)

    def _compared(self, inputs: Inputs, allowed: float, in_float64: bool = False, bisect: bool = False) -> _Compared:
        """Compare gated and slim. Raises `_DoesNotRunError` if the gated model doesn't run on these inputs."""
        model, undo_log = self.model, UndoLog()
        modes = set_modes(model, False)
        with attributes_preserved(modules_of(model)):
            try:
                put_trial_weights(model, self.analysis, self.live, undo_log, in_float64)
                if in_float64:
                    inputs = tree_map_only(Tensor, lambda t: t.double() if t.is_floating_point() else t, inputs)
                write_live(model, self.analysis.channel_map, self.live)
                return self._slimmed(inputs, allowed, in_float64 or bisect, undo_log)
            finally:
                undo_log.undo()
                write_live(model, self.analysis.channel_map, torch.ones_like(self.live))
                set_modes(model, modes)

    def _slimmed(self, inputs: Inputs, allowed: float, bisect: bool, undo_log: UndoLog) -> _Compared:
        """Slim a gated model, and compare."""
        model, analysis, live = self.model, self.analysis, self.live
        rounding: list[float] = []
        values = None
        try:
            with attributes_preserved(modules_of(model)):  # what it keeps from one call to the next has gated sizes
                wanted = Outputs.of(model, *inputs, training=self.training)
            if bisect:
                values = ValuesOfModules(model, analysis, live, inputs, self.training, self.number)
                rounding = [] if self.training else rounding_errors(model, *inputs)
        except Exception as error:
            raise _DoesNotRunError from error
        running = RunningModules(model)
        mode = " in train mode" if self.training else ""
        try:
            self.plan = self.plan or plan(model, analysis, live, *inputs)  # no branch is dead: inputs don't matter
            apply(model, self.plan, undo_log, compiled=False)
            with running.followed():
                off = wanted.error(model, *inputs, allowed, rounding)
        except AutogateError as error:
            return _Compared(float("inf"), error.where, f"slim, it fails{mode} ({error.cause})")
        except Exception as error:
            return _Compared(
                float("inf"), running.failed_in(error), f"slim, it fails{mode} ({type(error).__name__}: {error})"
            )
        if values is None or off <= allowed:
            return _Compared(off)
        path = values.first_difference(model, inputs, allowed)
        return _Compared(off, path or "", f"slim, it computes other values{mode} ({off:.0e} of their size)")


class _DoesNotRunError(Exception):
    """The model doesn't run on these inputs."""
