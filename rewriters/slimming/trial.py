"""One slimming on trial: a model, slimmed for a random pattern of dead classes, is compared with the gated one."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from rewriters.analysis import Analysis, samples_in, trial_pattern
from rewriters.cross_channel import plain_statistics, write_live
from rewriters.errors import AutogateError
from rewriters.forwards import ShapeGuardError, guard
from rewriters.labelling import ChannelMap
from rewriters.outputs import EXACT_IN_FLOAT64, PLAINLY, TOLERANCE, Outputs, rounding_errors
from rewriters.recording import RunningModules, attributes_preserved, modules_of, named_tensors, set_modes
from rewriters.slimming.first_difference import ValuesOfModules
from rewriters.slimming.plan import SlimPlan, apply, plan
from rewriters.slimming.probe_inputs import SMALLER, Probe, probes
from rewriters.slimming.probing import OutputShapes, answers, finite
from rewriters.slimming.trial_inputs import Inputs, share_of, smaller_inputs
from rewriters.slimming.trial_weights import put_trial_weights
from rewriters.undo_log import UndoLog

_SEED = 3

_SECONDS, _SECONDS_FOR_PROBES, _PER_SECOND = 10.0, 0.02, 2e10
"""The longest run of a model that is worth it before training, and multiply-adds that a processor core does."""

_NOTHING: Inputs = ((), {})


@dataclass(frozen=True)
class Compared:
    """How far the slim model's outputs are off, and why.

    Attributes:
        error: relative to the size of the outputs.
        path: the module whose code made the first value that differs.
        reason: what is wrong; empty if nothing is, or if it isn't known yet.
        probe: the question that shows it; None if the example does.
        guarded: whether a guard in a rewritten forward refused its inputs.
    """

    error: float
    path: str | None = None
    reason: str = ""
    probe: Probe | None = None
    guarded: bool = False


@dataclass(frozen=True)
class _Run:
    """What the gated model returns for the example (`probe` is None) or a question."""

    inputs: Inputs
    wanted: Outputs | OutputShapes
    probe: Probe | None = None
    values: ValuesOfModules | None = None
    rounding: tuple[float, ...] = ()


class _DoesNotRunError(Exception):
    """The model doesn't run on these inputs."""


class Trial:
    """Compares a model, slimmed for a trial pattern, with the gated one.

    Args:
        model: as it was analysed, with its statistics over live channels placed.
        analysis: of that model.
    """

    def __init__(self, model: nn.Module, analysis: Analysis):
        self.model, self.analysis = model, analysis
        self.number, self.example, self.training = 0, _NOTHING, False
        self.traced: Collection[str] | None = None
        self.plan: SlimPlan | None = None
        channel_map = analysis.channel_map
        self.live = _pattern(channel_map)
        self.all_live = torch.ones_like(self.live)
        self.macs = sum(channel_map.macs(kernel, self.all_live) for kernel in channel_map.kernels)
        self.guarded = any(
            node.target is guard
            for site in analysis.sites for way in site.ways for graph in way.values() for node in graph.nodes
        )  # fmt: skip

    def found(
        self, number: int, example: Inputs, training: bool, traced: Collection[str] | None = None
    ) -> Compared | None:
        """What differs by more than rounding for an example, if anything; None if nothing could be compared.

        Args:
            number: of the example.
            example: its inputs, by position and by name.
            training: whether to compare in train mode.
            traced: in eval mode the model is also asked what the example leaves open, see `probes`; not if None.
        """
        self.number, self.example, self.training = number, example, training
        self.traced = None if training else traced
        for inputs in smaller_inputs(*example, most_samples=None if training else 1):
            if self._seconds(inputs) > _SECONDS:
                return None
            try:
                found = self._found(inputs)
            except _DoesNotRunError:
                continue
            is_smaller = found.probe is None and share_of(inputs, example) < 1
            return replace(found, probe=SMALLER) if is_smaller else found
        return None

    def _seconds(self, inputs: Inputs) -> float:
        return self.macs * samples_in(*self.example) * share_of(inputs, self.example) / _PER_SECOND

    def _found(self, inputs: Inputs) -> Compared:
        types = {t.dtype for t in named_tensors(self.model).values() if isinstance(t, nn.Parameter)}
        allowed = max((TOLERANCE.get(dtype, 0.0) for dtype in types), default=0.0)
        first = self._compared(inputs, allowed)
        if first.error <= allowed or first.reason:
            return first
        try:
            return self._compared(inputs, EXACT_IN_FLOAT64, in_float64=True)
        except _DoesNotRunError:
            return self._compared(inputs, PLAINLY, bisect=True)

    def _compared(self, inputs: Inputs, allowed: float, in_float64: bool = False, bisect: bool = False) -> Compared:
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
                write_live(model, self.analysis.channel_map, self.all_live)
                set_modes(model, modes)

    def _slimmed(self, inputs: Inputs, allowed: float, bisect: bool, undo_log: UndoLog) -> Compared:
        """Slim a gated model, and compare."""
        model = self.model
        try:
            runs = [self._run(inputs, bisect)]
        except Exception as error:
            raise _DoesNotRunError from error
        running = RunningModules(model)
        try:
            if self.plan is None:  # without dead branches inputs don't matter
                self.plan = plan(model, self.analysis, self.live, *inputs, rewritten=self.analysis.resized)
            for found in self._asked(inputs, allowed, bisect):
                if isinstance(found, Compared):
                    return found
                runs.append(found)
            apply(model, self.plan, undo_log, compiled=False)
        except Exception as error:
            return self._failed(error, running)
        compared = (self._difference(run, running, allowed) for run in runs)
        return next((one for one in compared if one.error > allowed), Compared(0.0))

    def _run(self, inputs: Inputs, bisect: bool, probe: Probe | None = None) -> _Run:
        model = self.model
        with attributes_preserved(modules_of(model)):  # what it keeps from one call to the next has gated sizes
            wanted = Outputs.of(model, *inputs, training=self.training)
        if not bisect:
            return _Run(inputs, wanted, probe)
        values = ValuesOfModules(model, self.analysis, self.live, inputs, self.training, self.number)
        rounding = () if self.training else tuple(rounding_errors(model, *inputs))
        return _Run(inputs, wanted, probe, values, rounding)

    def _difference(self, run: _Run, running: RunningModules, allowed: float, state: str = "slim") -> Compared:
        """How far the slim model is off in one run."""
        try:
            with running.followed():
                off = run.wanted.error(self.model, *run.inputs, allowed, run.rounding)
        except Exception as error:
            return self._failed(error, running, run.probe, state)
        if off <= allowed:
            return Compared(off)
        where = self._where(run.probe)
        path, what = "", f"returns tensors of other shapes{where}"
        if isinstance(run.wanted, Outputs):
            if run.values is None:
                return Compared(off, probe=run.probe)
            path = run.values.first_difference(self.model, run.inputs, allowed) or ""
            what = f"computes other values{where} ({off:.0e} of their size)"
        return Compared(off, path, f"{state}, it {what}", run.probe)

    def _failed(
        self, error: Exception, running: RunningModules, probe: Probe | None = None, state: str = "slim"
    ) -> Compared:
        path = error.where if isinstance(error, AutogateError) else running.failed_in(error)
        cause = error.cause if isinstance(error, AutogateError) else f"{type(error).__name__}: {error}"
        reason = f"{state}, it fails{self._where(probe)} ({cause})"
        return Compared(float("inf"), path, reason, probe, isinstance(error, ShapeGuardError))

    def _where(self, probe: Probe | None) -> str:
        return " in train mode" if self.training else f" {probe.what}" if probe is not None else ""

    def _asked(self, inputs: Inputs, allowed: float, bisect: bool) -> list[_Run | Compared]:
        """What the gated model returns for each question, or how it differs from the dense one."""
        assert self.plan is not None
        if self.traced is None or not (self.plan.forwards or self.guarded):
            return []
        questions = probes(self.model, inputs, self.traced)
        found = answers(self.model, inputs, questions, lambda probe, given: self._answer(probe, given, allowed, bisect))
        return [one.found for one in found]

    def _answer(self, probe: Probe, inputs: Inputs, allowed: float, bisect: bool) -> _Run | Compared:
        """Raises whatever the dense model raises for inputs that it doesn't take."""
        if self._seconds(inputs) > _SECONDS_FOR_PROBES:
            return _Run(inputs, OutputShapes.of(self.model, *inputs), probe)
        refused = self._prepared(probe, inputs, allowed, bisect) if self.guarded else None
        if refused is not None:
            return refused
        run = self._run(inputs, bisect, probe)
        if isinstance(run.wanted, Outputs) and not finite(run.wanted):
            raise _DoesNotRunError  # nothing can be compared
        return run

    def _prepared(self, probe: Probe, inputs: Inputs, allowed: float, bisect: bool) -> Compared | None:
        """How a forward that takes statistics over the live channels differs from the dense model's, if it does."""
        model, channel_map = self.model, self.analysis.channel_map
        values = None
        with plain_statistics(model):
            dense = Outputs.of(model, *inputs)
            if bisect:
                values = ValuesOfModules(model, self.analysis, self.all_live, inputs, number=self.number)
        write_live(model, channel_map, self.all_live)
        try:
            found = self._difference(
                _Run(inputs, dense, probe, values, tuple(rounding_errors(model, *inputs)) if bisect else ()),
                RunningModules(model), allowed, "prepared",
            )  # fmt: skip
        finally:
            write_live(model, channel_map, self.live)
        return None if found.error <= allowed else found


def _pattern(channel_map: ChannelMap) -> Tensor:
    """Half of the classes at random, but some and not all of each group: no branch is dead."""
    live = trial_pattern(channel_map.size, _SEED).numpy()
    for group in channel_map.groups():
        classes = list(group.classes)
        if live[classes].all():
            live[classes[len(classes) // 2]] = False
    return channel_map.survivors(torch.from_numpy(live))
