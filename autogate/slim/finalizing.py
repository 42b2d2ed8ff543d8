"""Slim a prepared model and verify that its outputs stay the same. If anything fails, the model is left as it was.

Outputs are compared in full precision, whatever a GPU is allowed to round (`rewriters.outputs`). A deep network whose
weights amplify rounding may differ by more than float32's tolerance. Only then a copy of it is slimmed in float64,
which shows whether rounding is all there is. What the example inputs leave open is asked too (`asking.py`).

The model is analysed again, instead of keeping the analysis from prepare. This is quick, a deep copy or a pickle of a
gated model stays small, and a layer that was replaced in between is noticed, because the two channel maps differ.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from autogate.gating import BANK, GateBank, has_shards
from autogate.inputs import Inputs, fitted
from autogate.slim.asking import ask, copies_of
from autogate.slim.history import Slimming
from autogate.slim.record_replay import AnalysisOptions, analyse_channels, slim_and_record, slim_as_recorded
from autogate.wrappers import unwrap_accelerate
from rewriters import (
    Analysis,
    AutogateError,
    Outputs,
    Shortcut,
    UndoLog,
    VerificationError,
    plan,
    rounding_errors,
)
from rewriters.outputs import EXACT_IN_FLOAT64, PLAINLY, TOLERANCE
from rewriters.recording import forget
from rewriters.slimming import ValuesOfModules

_REPORT = "Please report the model."

_UNASKED = "If the model is only run as it is, on inputs like the example's, pass probe=False to finalize."


@dataclass(frozen=True)
class PrepareRecord:
    """What prepare leaves in the gate bank, so that finalize finds the same channels again.

    Attributes:
        options: the arguments of prepare that decide where channels are.
        dtype: dtype of the model's parameters at that time (`dtype_of_parameters`).
        shortcuts: the convolutions that prepare put on identity shortcuts.
        shared: modules whose identity shortcuts stay though convolutions were asked for, by path, and why.
    """

    options: AnalysisOptions
    dtype: torch.dtype | None
    shortcuts: tuple[Shortcut, ...] = ()
    shared: Mapping[str, str] = field(default_factory=dict)

    def calls_for(self, model: nn.Module) -> tuple[Inputs, ...]:
        """All example inputs, on the device and in the dtype that the model has now."""
        return tuple(fitted(call, model, self.dtype) for call in (self.options.inputs, *self.options.others))


def slim_verified(model: nn.Module, bank: GateBank, calls: Sequence[Inputs], probe: bool = True) -> Slimming:
    """Slim a prepared model, compare its outputs, and detach its gate bank.

    A deep network may round by more than float32's tolerance: it is slimmed if a float64 copy of it is exact.

    Args:
        model: a prepared model, its gates folded.
        bank: its gate bank.
        calls: inputs to compare the outputs on.
        probe: whether to compare them on inputs made from these too, and those of copies of the slim model.

    Returns:
        A record of what was done.

    Raises:
        AutogateError: see `autogate.finalize`. The model is left as it was.
    """
    _check_sizes(model, bank)
    try:
        done = _slim_compared(model, bank, calls, probe, TOLERANCE)
    except VerificationError as error:
        if not _is_exact_in_float64(model, bank, calls, probe):
            raise _with_module(error, _first_module(model, bank, calls, probe)) from None
        done = _slim_compared(model, bank, calls, False, dict.fromkeys(TOLERANCE, float("inf")))
    bank.detach()
    return done


def slim_unverified(model: nn.Module, bank: GateBank, slimming: Slimming) -> Slimming:
    """Slim a prepared model as an earlier one was, and detach its gate bank. Its weights and gates don't matter.

    Args:
        model: a model that was prepared like the one that the record is of.
        bank: its gate bank.
        slimming: the record.

    Raises:
        AutogateError: the channels of the model are coupled in another way. The model is left as it was.
    """
    undo_log = UndoLog()
    try:
        unwrap_accelerate(model, undo_log)
        _remove_gates(model, bank, undo_log)
        done = _slim(model, bank, undo_log, slimming)
    except BaseException:
        undo_log.undo()
        raise
    bank.detach()
    return done


def _remove_gates(model: nn.Module, bank: GateBank, undo_log: UndoLog) -> None:
    """Let a model be as it was prepared: without gates, and without tables that its forwards have kept since."""
    forget(model, bank.origin.options.kept, undo_log)
    undo_log.remove(model._modules, BANK)
    undo_log.remove(model._forward_pre_hooks, bank.hook.id)


def _slim_compared(
    model: nn.Module, bank: GateBank, calls: Sequence[Inputs], probe: bool, tolerance: Mapping[torch.dtype, float]
) -> Slimming:
    """Slim the model; outputs that are rounding alone are only told from others if the comparison fails."""
    try:
        return _slim_once(model, bank, calls, probe, tolerance)
    except VerificationError as error:
        try:
            return _slim_once(model, bank, calls, probe, tolerance, by_rounding=True)
        except VerificationError:
            raise
        except Exception:  # what a compiled submodule, say, may raise when its ops are looked at
            raise error from None


@dataclass(frozen=True)
class _Run:
    """What the model returned before it was slimmed; `what` says how the inputs differ from the example's."""

    inputs: Inputs
    wanted: Outputs
    what: str = ""
    rounding: Sequence[float] = ()


def _runs(model: nn.Module, calls: Sequence[Inputs], probe: bool, by_rounding: bool) -> list[_Run]:
    runs = [_Run(call, Outputs.of(model, *call)) for call in calls]
    if probe:
        asked = [answer for call in calls for answer in ask(model, call)]
        runs += [_Run(answer.inputs, answer.found, f" {answer.probe.what}") for answer in asked]
    return [replace(run, rounding=rounding_errors(model, *run.inputs)) for run in runs] if by_rounding else runs


def _slim_once(
    model: nn.Module, bank: GateBank, calls: Sequence[Inputs], probe: bool, tolerance: Mapping[torch.dtype, float],
    by_rounding: bool = False,
) -> Slimming:  # fmt: skip
    undo_log = UndoLog()
    try:
        unwrap_accelerate(model, undo_log)
        runs = _runs(model, calls, probe, by_rounding)
        _remove_gates(model, bank, undo_log)
        copies = copies_of(model) if probe else {}
        analysis, options = _analysed(model, bank)
        trained = [_trained(model, call) if analysis.trains_otherwise else None for call in calls]
        method = repr(bank.learner.method) if float(bank.step_count) else ""
        live, shortcuts = bank.live, bank.origin.shortcuts
        done = slim_and_record(model, analysis, live, options, shortcuts, undo_log, method=method)
        for run in runs:
            remedy = _UNASKED if run.what else _REPORT
            verify(model, run.inputs, run.wanted, f"the slim model{run.what}", tolerance, run.rounding, remedy)
        for call, trains in zip(calls, trained, strict=True):
            if trains is not None and not done.removed:  # what is removed drops nothing at random any more
                verify(model, call, trains, "the slim model in train mode", tolerance)
        last = runs[-1]
        for what, made in copies.items() if done.rewritten else ():
            verify(made(model), last.inputs, last.wanted, what, tolerance, last.rounding, _UNASKED)
    except BaseException:
        undo_log.undo()
        raise
    return done


def _trained(model: nn.Module, call: Inputs) -> Outputs | None:
    """What the model returns in train mode; None if it doesn't run on these inputs then (it may want targets)."""
    try:
        return Outputs.of(model, *call, training=True)
    except Exception:  # of the user's own code
        return None


def _is_exact_in_float64(model: nn.Module, bank: GateBank, calls: Sequence[Inputs], probe: bool) -> bool:
    """Whether slimming a float64 copy of a float32 model is exact; False for models that don't run in float64."""
    if any(tensor.dtype != torch.float32 for tensor in model.parameters() if tensor.is_floating_point()):
        return False
    twin, gates = _float64_twin(model)
    try:
        _slim_compared(twin, gates, [*map(_in_float64, calls)], probe, {torch.float64: EXACT_IN_FLOAT64})
    except Exception:  # a forward written for float32 can fail in any way
        return False
    finally:
        gates.detach()
    return True


def _float64_twin(model: nn.Module) -> tuple[nn.Module, GateBank]:
    """A copy of a prepared model in float64, and its gate bank, which has to be detached."""
    twin = copy.deepcopy(model).double()
    gates: GateBank = getattr(twin, BANK)
    origin: PrepareRecord = gates.origin
    in_float64 = [*map(_in_float64, (origin.options.inputs, *origin.options.others))]
    gates.origin = replace(origin, options=origin.options.on(in_float64))
    return twin, gates


def _in_float64(inputs: Inputs) -> Inputs:
    return tree_map_only(Tensor, lambda tensor: tensor.double() if tensor.is_floating_point() else tensor, inputs)


def _first_module(model: nn.Module, bank: GateBank, calls: Sequence[Inputs], probe: bool) -> str | None:
    """Path of the module whose own code first computes something else when the model is slim; None if unknown."""
    calls = [*calls, *(answer.inputs for call in calls for answer in ask(model, call))] if probe else calls
    twin, gates = _float64_twin(model)
    try:
        return _bisected(twin, gates, [*map(_in_float64, calls)], EXACT_IN_FLOAT64)
    except Exception:  # a forward written for float32 can fail in any way
        return _bisected(model, bank, calls, PLAINLY)
    finally:
        gates.detach()


def _bisected(model: nn.Module, bank: GateBank, calls: Sequence[Inputs], allowed: float) -> str | None:
    undo_log = UndoLog()
    try:
        unwrap_accelerate(model, undo_log)
        _remove_gates(model, bank, undo_log)
        analysis, options = _analysed(model, bank)
        live = plan(model, analysis, bank.live, *options.inputs).live
        modes = (False, True) if analysis.trains_otherwise else (False,)
        examples = [(call, min(number, len(analysis.recorded) - 1)) for number, call in enumerate(calls)]
        runs = [(call, ValuesOfModules(model, analysis, live, call, mode, number))
                for mode in modes for call, number in examples]  # fmt: skip
        slim_and_record(model, analysis, bank.live, options, bank.origin.shortcuts, undo_log)
        found = (values.first_difference(model, call, allowed) for call, values in runs)
        return next((path for path in found if path is not None), None)
    finally:
        undo_log.undo()


def _with_module(error: VerificationError, path: str | None) -> VerificationError:
    """The error, with the module that is to blame and how to keep its channels."""
    if path is None:
        return error
    place = f"The first module to compute something else is {path!r}." if path else "Its own forward is to blame."
    remedy = error.remedy.replace("ignore=[...]", f"ignore=[{path!r}]") if path else error.remedy
    return VerificationError(f"{error.cause} {place}", where=error.where, remedy=remedy)


def _slim(model: nn.Module, bank: GateBank, undo_log: UndoLog, recorded: Slimming) -> Slimming:
    analysis, options = _analysed(model, bank)
    return slim_as_recorded(model, analysis, recorded, options, bank.origin.shortcuts, undo_log)


def _analysed(model: nn.Module, bank: GateBank) -> tuple[Analysis, AnalysisOptions]:
    """Analyse a model whose gates were removed, and make sure that its channels are those that were prepared."""
    origin: PrepareRecord = bank.origin
    options = origin.options.on(origin.calls_for(model))
    analysis = analyse_channels(model, options)
    changed = bank.channel_map.difference(analysis.channel_map, costs=not analysis.opaque)
    if changed is not None:
        raise _has_changed(changed)
    return analysis, options


def _check_sizes(model: nn.Module, bank: GateBank) -> None:
    """Raise for a layer with another number of channels than it was prepared with, before the model fails on it."""
    tensors = dict(itertools.chain(model.named_parameters(remove_duplicate=False), model.named_buffers()))
    for side, classes in bank.channel_map.classes.items():
        tensor = tensors.get(side.tensor)
        if tensor is not None and tuple(tensor.shape[side.dim : side.dim + 1]) != (len(classes),):
            raise _has_changed(side.tensor)


def _has_changed(where: str) -> AutogateError:
    return AutogateError(
        "this layer has changed since the model was prepared.",
        where=where,
        remedy="Change layers before prepare, or prepare the changed model again.",
    )


def verify(
    model: nn.Module,
    inputs: Inputs,
    wanted: Outputs,
    what: str,
    tolerance: Mapping[torch.dtype, float] = TOLERANCE,
    rounding: Sequence[float] = (),
    remedy: str = _REPORT,
) -> None:
    """Raise unless a model's outputs are what they were.

    Args:
        model: the changed model.
        inputs: inputs to run it on.
        wanted: the outputs from before the change.
        what: what the message calls the model.
        tolerance: largest relative difference, by dtype.
        rounding: how large an output may be that is rounding alone (`rewriters.rounding_errors`).
        remedy: what the caller can do, besides keeping the channels of a module.

    Raises:
        VerificationError: the outputs differ by more.
    """
    allowed = max((tolerance.get(value.dtype, 0.0) for value in wanted.values), default=0.0)
    remedy = f"To work around it, keep channels with `prepare(..., ignore=[...])`. {remedy}"
    try:
        error = wanted.error(model, *inputs, allowed, rounding)
    except Exception as failure:
        if what == "the slim model":
            raise
        raise VerificationError(f"{what} fails: {failure}", where=type(model).__name__, remedy=remedy) from failure
    if not error <= allowed:
        raise VerificationError(
            f"the outputs of {what} differ by {error:.1e} of their size, more than {allowed:.0e}; "
            "the model is left as it was.",
            where=type(model).__name__,
            remedy=remedy,
        )


def check_not_sharded(model: nn.Module) -> None:
    """Raise if the parameters are sharded over processes."""
    if has_shards(model):
        raise AutogateError(
            "its parameters are sharded over processes; only whole parameters can be sliced.",
            where=type(model).__name__,
            remedy="On all ranks gather them: state = get_model_state_dict(model, options=StateDictOptions("
            "full_state_dict=True, cpu_offload=True)) from torch.distributed.checkpoint.state_dict. On one rank "
            "prepare the plain model as before, load_state_dict(state) and finalize it.",
        )


def check_finite(model: nn.Module) -> None:
    """Raise if a parameter is not finite or a buffer has a NaN. Buffers may hold infinities, as masks do."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        broken = ~torch.isfinite(tensor) if isinstance(tensor, nn.Parameter) else torch.isnan(tensor)
        if tensor.is_floating_point() and broken.any():
            raise AutogateError(
                f"{int(broken.sum())} of its {tensor.numel()} values are not finite.",
                where=name,
                remedy="Load a checkpoint from before training diverged.",
            )
