"""Finalize a model with saliency modules: what no image uses goes, and work that is off for an image is skipped."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from autogate.inputs import Inputs, as_calls, fitted
from autogate.saliency import NAME, SaliencyBank, meet, saliency_of
from autogate.skipping.break_even import ALL, BreakEven
from autogate.skipping.folding import PassingNorm, norm_of
from autogate.skipping.forwards import SkippingForward
from autogate.skipping.grouping import group, grouping_of, ungroup
from autogate.skipping.links import links
from autogate.skipping.pooling import PoolingForward
from autogate.skipping.timing import inputs_of, measured
from autogate.skipping.unused import analysed, close, live_classes, put_on, slim, take_off, used_classes
from autogate.slim import check_finite, tell_of_steps_with, verify
from autogate.wrappers import unwrap_accelerate
from rewriters import AutogateError, Outputs, UndoLog, VerificationError
from rewriters.outputs import EXACT_IN_FLOAT64, TOLERANCE
from rewriters.recording import set_modes

M = TypeVar("M", bound=nn.Module)

Forwards = dict[str, SkippingForward | PoolingForward]
"""Forwards that can skip, by the paths of their modules."""

CLOSE_ENOUGH = 0.01
"""How far above the budget the mean cost may be without a warning."""


def finalize_adaptive(
    model: M, bank: SaliencyBank, example_inputs: Any = None, *, batches: Iterable[Any] | None = None,
    prototypes: int | None = None, break_even: float | None = None, warn: bool = True,
) -> M:  # fmt: skip
    """Make a model skip what its saliency modules switch off. See `autogate.adaptive.finalize`.

    Args:
        model: changed in place, and returned.
        bank: its saliency bank.
        example_inputs: inputs to compare the outputs on; those given to `prepare` if None.
        batches: of images; channels that none of them uses are removed. None removes none.
        prototypes: how many codes images may have in a stage of the model; None: any. Chosen on the batches.
        break_even: share of a layer's work up to which it skips; None: measured.
        warn: whether to warn if the training isn't over.

    Raises:
        AutogateError: it is finalized already, a weight isn't finite, scores are NaN or infinite, there are no batches,
            or a layer has changed since the model was prepared.
        VerificationError: outputs would differ. The model is left as it was.
    """
    if forwards_in(model):
        raise AutogateError(
            "it skips already: it was finalized before.", where=type(model).__name__,
            remedy="Finalize it once. autogate.adaptive.budget sets another budget.",
        )  # fmt: skip
    if prototypes is not None and (batches is None or prototypes < 1):
        raise AutogateError(
            f"prototypes is {prototypes!r}, and batches are {'missing' if batches is None else 'given'}.",
            where="finalize", remedy="Ask for one or more, and pass batches=loader: prototypes are chosen on images.",
        )  # fmt: skip
    batches = list(batches) if batches is not None and iter(batches) is batches else batches
    check_finite(model)
    if warn and (missed := _missed(bank)):
        warnings.warn(missed, stacklevel=4)
    given = None if example_inputs is None else as_calls(example_inputs, model)
    calls = bank.origin.calls_for(model) if given is None else tuple(fitted(call, model) for call in given)
    used = None if batches is None else used_classes(model, bank, batches)
    before = dict(model.named_parameters())
    forwards, undo_log = _compared(model, bank, used, calls)
    try:
        _set_break_even(model, forwards, inputs_of(model, list(forwards), calls[0]), break_even)
        if prototypes is not None and batches is not None:
            group(model, bank, calls[0], batches, prototypes, undo_log)
    except BaseException:
        undo_log.undo()
        raise
    after = dict(model.named_parameters())
    tell_of_steps_with(tensor for name, tensor in before.items() if after.get(name) is not tensor)
    return model


def set_budget(model: nn.Module, bank: SaliencyBank, flops: float, batches: Iterable[Any]) -> float:
    """Set another budget, see `autogate.adaptive.budget`; a model with prototypes gets new ones for it."""
    grouping = grouping_of(bank)
    if grouping is None:
        return meet(model, bank, flops, batches)
    batches = list(batches) if iter(batches) is batches else batches
    before, undo_log = float(bank.threshold), UndoLog()
    try:
        ungroup(model, bank, undo_log)
        meet(model, bank, flops, batches)
        count = max(found for _, found in grouping.stages)
        return group(model, bank, bank.origin.calls_for(model)[0], batches, count, undo_log).cost
    except BaseException:
        undo_log.undo()
        bank.set_threshold(before)
        raise


def _compared(
    model: nn.Module, bank: SaliencyBank, used: Tensor | None, calls: Sequence[Inputs]
) -> tuple[Forwards, UndoLog]:
    """Let a model skip, and compare its outputs. Returns the forwards that can skip, and all changes.

    A deep network may round by more than float32's tolerance: then a copy of it in float64 has to be exact.
    """
    try:
        return _tried(model, bank, used, calls, TOLERANCE)
    except VerificationError:
        if not _is_exact_in_float64(model, used, calls):
            raise
    return _tried(model, bank, used, calls, dict.fromkeys(TOLERANCE, float("inf")))


def _tried(
    model: nn.Module, bank: SaliencyBank, used: Tensor | None, calls: Sequence[Inputs],
    tolerance: Mapping[torch.dtype, float],
) -> tuple[Forwards, UndoLog]:  # fmt: skip
    undo_log = UndoLog()
    try:
        return _skipping(model, bank, used, calls, undo_log, tolerance), undo_log
    except BaseException:
        undo_log.undo()
        raise


def _is_exact_in_float64(model: nn.Module, used: Tensor | None, calls: Sequence[Inputs]) -> bool:
    if any(tensor.dtype != torch.float32 for tensor in model.parameters() if tensor.is_floating_point()):
        return False
    twin = copy.deepcopy(model).double()
    bank = saliency_of(twin)
    assert bank is not None
    try:
        inputs = [fitted(call, twin, torch.float32) for call in calls]
        _skipping(twin, bank, used, inputs, UndoLog(), {torch.float64: EXACT_IN_FLOAT64})
    except Exception:  # a forward written for float32 can fail in any way
        return False
    finally:
        bank.detach()
    return True


def _skipping(
    model: nn.Module, bank: SaliencyBank, used: Tensor | None, calls: Sequence[Inputs], undo_log: UndoLog,
    tolerance: Mapping[torch.dtype, float],
) -> Forwards:  # fmt: skip
    """Remove what isn't used, and let the rest skip whatever is off. Returns the forwards that can skip."""

    def check(what: str) -> None:
        for call, outputs in zip(calls, wanted, strict=True):
            verify(model, call, outputs, what, tolerance)

    unwrap_accelerate(model, undo_log)
    if used is None:
        wanted = _outputs(model, bank, calls)
    else:
        wanted = _slimmed(model, bank, used, calls, undo_log)
        check("the slim model")
    forwards = with_forwards(model, bank, undo_log)
    for forward in forwards.values():
        forward.break_even = ALL
    check("the model that skips")
    return forwards


def _outputs(model: nn.Module, bank: SaliencyBank, calls: Sequence[Inputs]) -> list[Outputs]:
    """The outputs of each call. Raises if scores are NaN or infinite: outputs would be so too."""
    found = []
    for call in calls:
        found.append(Outputs.of(model, *call))
        if bank.notes.has_scores:
            bank.cost_of_images()
    return found


def _missed(bank: SaliencyBank) -> str:
    """What a training has left undone, in words."""
    steps, run, cost = int(bank.step_count), bank.run, float(bank.cost)
    at = f"finalized after {steps} of {run.steps} steps"
    if steps < run.warm_steps:
        return f"{at}, before the warm-up was over: the saliency modules have hardly learned what to compute."
    if steps < run.steps and cost > run.flops + CLOSE_ENOUGH:
        return f"{at}, before the budget was met: images take {cost:.1%} of the FLOPs, the target is {run.flops:.1%}."
    return ""


def forwards_in(model: nn.Module) -> dict[str, SkippingForward]:
    """The forwards of a model's layers that skip, by path; empty if it isn't finalized."""
    found = ((path, module.__dict__.get("forward")) for path, module in model.named_modules())
    return {path: forward for path, forward in found if isinstance(forward, SkippingForward)}


def _set_break_even(
    model: nn.Module,
    forwards: Forwards,
    inputs: Mapping[str, Tensor],
    given: float | None,
) -> None:
    before = set_modes(model, False)  # what runs later: in train mode a norm would take statistics of what is timed
    try:
        for path, forward in forwards.items():
            if given is not None:
                forward.break_even = BreakEven(given, given)
            else:  # one that the example doesn't run, runs whole
                forward.break_even = measured(forward, inputs[path]) if path in inputs else None
    finally:
        set_modes(model, before)


def _slimmed(
    model: nn.Module, bank: SaliencyBank, used: Tensor, calls: Sequence[Inputs], undo_log: UndoLog
) -> list[Outputs]:
    """Remove the channels that aren't used. Returns the outputs with these channels off."""
    taken = take_off(model, bank, undo_log)
    analysis = analysed(model, bank)
    put_on(taken, undo_log)
    live = live_classes(model, bank, analysis.channel_map, used)
    close(bank, live, undo_log)
    wanted = _outputs(model, bank, calls)
    if not live.all():
        take_off(model, bank, undo_log)
        slim(model, bank, live, analysis, taken, undo_log)
        put_on(taken, undo_log)
    return wanted


def with_forwards(model: nn.Module, bank: SaliencyBank, undo_log: UndoLog) -> Forwards:
    """Put forwards on layers that don't run whole, and on poolings. Returns those that can skip; none does yet."""
    found: Forwards = {}
    stays = torch.cat([~bank.counting.zero, torch.ones(1, dtype=torch.bool)])
    layers = bank.counting.layers
    for layer, link in zip(layers, links(layers, bank.counting.zero), strict=True):
        if layer.kind == "whole":
            continue
        owner, norm, by_itself = model.get_submodule(layer.path), None, False
        module: Any = None
        if layer.scaling is not None:
            module, by_itself = owner._modules[NAME], layer.scaling.path == layer.path
            known = None if by_itself else norm_of(model, layer.scaling)
            if known is not None:
                norm = PassingNorm(known)
                undo_log.set_attribute(known, "forward", norm)
        at_once = by_itself or norm is not None
        forward = SkippingForward(owner, module, layer, bank.notes, stays, norm, at_once, link)
        undo_log.set_attribute(owner, "forward", forward)
        if forward.can_skip:
            found[layer.path] = forward
    for path, pool in model.named_modules():
        if type(pool) is nn.MaxPool2d and "forward" not in pool.__dict__:
            found[path] = PoolingForward(pool)
            undo_log.set_attribute(pool, "forward", found[path])
    return found
