"""Take the closed channels out of a prepared model, and see that its outputs stay: whole or not at all."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from autogate.gating import BANK, GateBank, has_shards
from autogate.inputs import Inputs, fitted
from autogate.slim.history import Slimming
from autogate.slim.record_replay import AnalysisOptions, analyse_with_dry_run, slim_and_record
from autogate.wrappers import take_off_accelerate
from rewriters import (
    AutogateError,
    Shortcut,
    UndoLog,
    VerificationError,
    relative_error,
    run_eval,
)

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""Largest relative difference that finalize accepts between the gated and the slim model's outputs."""

EXACT_IN_FLOAT64 = 1e-10
"""Largest relative difference in float64 of a model whose float32 outputs differ by their rounding alone."""


@dataclass(frozen=True)
class PrepareRecord:
    """What prepare was called with, for finalize to read the same channels again.

    Attributes:
        options: what channels depend on.
        dtype: of the model's parameters then (`dtype_of_parameters`).
        shortcuts: the convolutions that were put on shortcuts.
    """

    options: AnalysisOptions
    dtype: torch.dtype | None
    shortcuts: tuple[Shortcut, ...] = ()

    def inputs_for(self, model: nn.Module) -> Inputs:
        """The example inputs, as the model has been moved and cast since."""
        return fitted(self.options.inputs, model, self.dtype)


def slim_verified(model: nn.Module, bank: GateBank, inputs: Inputs) -> Slimming:
    """Slim a prepared model, and end its bank's life; what was done.

    Deep networks may round by more than float32's tolerance: such a one is slimmed if a copy of it in float64 is exact.

    Args:
        model: prepared, its gates folded.
        bank: its bank.
        inputs: what outputs are compared on.

    Raises:
        AutogateError: as `autogate.finalize`; the model is as it was then.
    """
    try:
        done = _slim_compared(model, bank, inputs, TOLERANCE)
    except VerificationError:
        if not _is_exact_in_float64(model, bank, inputs):
            raise
        done = _slim_compared(model, bank, inputs, dict.fromkeys(TOLERANCE, float("inf")))
    bank.detach()
    return done


def _slim_compared(
    model: nn.Module, bank: GateBank, inputs: Inputs, tolerance: Mapping[torch.dtype, float]
) -> Slimming:
    undo_log = UndoLog()
    try:
        take_off_accelerate(model, undo_log)
        wanted = run_eval(model, *inputs)
        undo_log.remove(model._modules, BANK)
        undo_log.remove(model._forward_pre_hooks, bank.hook.id)
        done = _slim(model, bank, undo_log)
        verify(model, inputs, wanted, "the slim model", tolerance)
    except BaseException:
        undo_log.undo()
        raise
    return done


def _is_exact_in_float64(model: nn.Module, bank: GateBank, inputs: Inputs) -> bool:
    """Whether a copy of a float32 model is slimmed exactly; False for models that don't run in float64."""
    if any(tensor.dtype != torch.float32 for tensor in model.parameters() if tensor.is_floating_point()):
        return False
    twin = copy.deepcopy(model).double()
    gates: GateBank = getattr(twin, BANK)
    origin: PrepareRecord = gates.origin
    gates.origin = replace(origin, options=origin.options._replace(inputs=_in_float64(origin.options.inputs)))
    try:
        _slim_compared(twin, gates, _in_float64(inputs), {torch.float64: EXACT_IN_FLOAT64})
    except Exception:  # whatever a forward made for float32 stumbles over
        return False
    finally:
        gates.detach()
    return True


def _in_float64(inputs: Inputs) -> Inputs:
    return tree_map_only(Tensor, lambda tensor: tensor.double() if tensor.is_floating_point() else tensor, inputs)


def _slim(model: nn.Module, bank: GateBank, undo_log: UndoLog) -> Slimming:
    origin: PrepareRecord = bank.origin
    options = origin.options._replace(inputs=origin.inputs_for(model))
    analysis = analyse_with_dry_run(model, options)
    changed = bank.channel_map.difference(analysis.channel_map, costs=not analysis.opaque)
    if changed is not None:
        raise AutogateError(
            "this layer is not what it was when the model was prepared.",
            where=changed,
            remedy="Change layers before prepare, or prepare the changed model anew.",
        )
    return slim_and_record(model, analysis, bank.live, options, origin.shortcuts, undo_log)


def verify(
    model: nn.Module,
    inputs: Inputs,
    wanted: list[Tensor],
    what: str,
    tolerance: Mapping[torch.dtype, float] = TOLERANCE,
) -> None:
    """Raises unless the outputs are what they were."""
    error = relative_error(run_eval(model, *inputs), wanted)
    allowed = max((tolerance.get(value.dtype, 0.0) for value in wanted), default=0.0)
    if not error <= allowed:
        raise VerificationError(
            f"the outputs of {what} differ by {error:.1e} of their size, more than {allowed:.0e}; "
            "the model is as it was.",
            where=type(model).__name__,
            remedy="Please report the model. `prepare(..., ignore=[...])` keeps a module's channels.",
        )


def check_not_sharded(model: nn.Module) -> None:
    if has_shards(model):
        raise AutogateError(
            "its parameters are sharded over processes, and a slim model is made of whole ones.",
            where=type(model).__name__,
            remedy="Gather them, state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, "
            "cpu_offload=True)) from torch.distributed.checkpoint.state_dict, on all ranks; on one of them prepare "
            "the plain model as before, load_state_dict(state) and finalize that.",
        )


def check_finite(model: nn.Module) -> None:
    """Parameters are to be finite; a buffer may hold an infinity (of a mask, of a range without an end)."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        broken = ~torch.isfinite(tensor) if isinstance(tensor, nn.Parameter) else torch.isnan(tensor)
        if tensor.is_floating_point() and broken.any():
            raise AutogateError(
                f"{int(broken.sum())} of its {tensor.numel()} values are not finite.",
                where=name,
                remedy="Go back to a checkpoint from before training diverged.",
            )
