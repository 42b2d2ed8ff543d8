"""The verbs: prepare, gates, summary, finalize."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import Any, Literal, TypeVar

from torch import jit, nn
from torch.optim import Optimizer

from autogate.budget import ResourceMaker, Shares
from autogate.gating import BANK, GateBank, Progress, has_shards
from autogate.inputs import as_call, dtype_of_parameters, fitted
from autogate.inspection import Summary, summarise
from autogate.lock import locked
from autogate.naming import did_you_mean, named_by
from autogate.slim import (
    AnalysisOptions,
    PrepareRecord,
    add_shortcut_convolutions,
    analyse_with_dry_run,
    as_optimizers,
    check_finite,
    check_not_sharded,
    kept_by_side,
    parameter_replacements,
    replace_parameters,
    slim_verified,
    verify,
)
from autogate.steering import DEFAULT_STEPS, Schedule
from autogate.wrappers import is_wrapped, unwrap
from rewriters import AutogateError, Shortcut, UndoLog, run_eval

M = TypeVar("M", bound=nn.Module)


class BudgetNotMetWarning(UserWarning):
    """The model was finalized before its gates had come down to the budget."""


@locked
def prepare(
    model: M,
    example_inputs: Any = None,
    *,
    flops: float | None = None,
    params: float | None = None,
    activations: float | None = None,
    latency: float | None = None,
    resources: Mapping[ResourceMaker, float] | None = None,
    steps: int | None = None,
    round_to: int = 1,
    ignore: Iterable[str] = (),
    shortcuts: Literal["shared", "conv"] | Iterable[str] = "shared",
    hooks: bool = True,
    embed: bool = True,
) -> M:
    """Give `model` gates that learn, in any training loop, which channels it can do without.

    No number in the model changes and nothing is added to its forward: gates are kept multiplied into the
    kernels, and move after each step of whatever optimizer trains these (see `GateBank`).

        >>> import timm, torch, autogate
        >>> model = timm.create_model("resnet18", num_classes=10)
        >>> model = autogate.prepare(model, flops=0.5, steps=1000)
        >>> autogate.gates(model).alpha.shape
        torch.Size([2880])

    Args:
        model: any module; the same object is returned. Prepare it before it is compiled or wrapped for
            distributed training.
        example_inputs: a tensor, a tuple of positional or a dict of keyword arguments that the model can be
            run on; a timm model needs none. A batch of two or more tells the batch from other dimensions.
        flops: share of the model's FLOPs (multiply-adds of convolutions and linear layers) to be left, in
            (0, 1]; 0.5 if no budget is named. Of several budgets all are met.
        params: share of its parameters to be left.
        activations: share of the bytes that its convolutions and linear layers give out for one sample.
        latency: share of the time that it takes here for one sample. Each layer is timed at a grid of widths,
            which takes a while the first time; the timings are kept on disk (see `autogate.budget.latency`).
        resources: shares of resources of your own, by their class (see `autogate.Resource`).
        steps: optimizer steps that training will take; the share is reached within them, and what training
            follows is plain. `autogate.steering.schedule.DEFAULT_STEPS` (10,000) if None.
        round_to: a layer that loses channels ends with a multiple of so many, as fast kernels like them.
        ignore: paths of modules, or names of parameters, whose channels all stay.
        shortcuts: "shared": what an identity shortcut's residual add couples (a whole stage) keeps or loses a
            channel together. "conv": each such shortcut becomes a 1x1 convolution, started as the identity, so
            that every block has a width of its own (Yang et al., "Non-uniform DNN Structured Subnets Sampling
            for Dynamic Inference", section IV.A.2). It costs FLOPs, which the budget counts; the share asked
            for is of the model without them. Paths of modules choose some. The new kernels are parameters:
            build the optimizer after prepare.
        hooks: gates move with every step of the optimizer that trains the kernels, through PyTorch's global
            step hooks. If False, call `autogate.step(model, lr=...)` after each.
        embed: whether channels that a norm across channels looks at (LayerNorm, GroupNorm, RMSNorm, GRN: the
            embedding of a transformer, the residual stream of a ConvNeXt) may die. While gates train such a
            norm then takes its statistics over the live channels. If False, these channels stay.

    Raises:
        AutogateError: the model can't be analysed, nothing in it can go, a share is out of reach, or an
            argument is wrong. The message names the place and the way out; the model is as it was.
    """
    _check_model(model)
    shares = Shares(flops, params, activations, latency, resources or {})
    schedule = Schedule(steps=DEFAULT_STEPS if steps is None else steps, round_to=round_to)
    ignored = dict.fromkeys(named_by(model, ignore), "the caller asked for it")
    options = AnalysisOptions(
        as_call(example_inputs, model), ignored, shortcuts if isinstance(shortcuts, str) else tuple(shortcuts), embed
    )
    undo_log = UndoLog()
    try:
        replaced = _replace_shortcuts(model, options, undo_log)
        analysis = analyse_with_dry_run(model, options)
        if analysis.channel_map.size == 0:
            raise AutogateError(
                f"no channel of it can go. {analysis.channel_map.why_pinned()}",
                where=type(model).__name__,
                remedy="Check `ignore` and that the model has convolutions or linear layers between its first and "
                "last.",
            )
        added = {shortcut.weight for shortcut in replaced}
        targets = shares.targets(model, analysis.channel_map, options.inputs, added)
        analysis.place_statistics(model, undo_log)
        origin = PrepareRecord(options, dtype_of_parameters(model), replaced)
        bank = GateBank(model, analysis.channel_map, targets, schedule, origin, added, hooks)
    except BaseException:
        undo_log.undo()
        raise
    model.add_module(BANK, bank)
    return model


def gates(model: nn.Module) -> GateBank:
    """The bank of gates of a prepared model.

    `bank.alpha`, shape (classes,), holds one entry for each class of coupled channels; `bank.where(i)` tells
    where class i lives. Setting entries to zero kills channels by a criterion of one's own:

        >>> import timm, torch, autogate
        >>> model = autogate.prepare(timm.create_model("resnet18", num_classes=10))
        >>> bank = autogate.gates(model)
        >>> with torch.no_grad():
        ...     bank.alpha[:100] = 0
        >>> slim = autogate.finalize(model, warn=False)

    Args:
        model: as `prepare` returned it; a compiled or distributed wrapper is looked through.

    Raises:
        AutogateError: the model was not prepared, or is finalized already.
    """
    model = unwrap(model)
    bank = model._modules.get(BANK) if isinstance(model, nn.Module) else None
    if not isinstance(bank, GateBank):
        within = _gated_within(model)
        raise AutogateError(
            "it has no gates: it was not prepared, or is finalized already.",
            where=type(model).__name__,
            remedy=f"Give its {within!r}, which has some." if within else "Call autogate.prepare(model) first.",
        )
    bank.kernels()  # where fully_shard has replacements them, the bank takes note
    return bank


def step(model: nn.Module, *, lr: float) -> None:
    """The gates' step, for a loop that was prepared with `hooks=False`: call it after the optimizer's.

    The mathematics are those of the hooks, which call the same code. The gradients have to stand in `.grad`
    as backward left them (unscaled and clipped, if you do that): an optimizer that writes into them, as SGD
    with `nesterov=True, foreach=True` does, needs the hooks. Where the optimizer skipped its step, skip this.

        >>> import timm, torch, autogate
        >>> model = timm.create_model("resnet18", num_classes=10)
        >>> model = autogate.prepare(model, steps=1000, hooks=False)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        >>> model(torch.randn(2, 3, 64, 64)).square().mean().backward()
        >>> optimizer.step()
        >>> autogate.step(model, lr=0.05)

    Args:
        model: prepared with `hooks=False`; a compiled or distributed wrapper is looked through.
        lr: the learning rate that the optimizer's step was taken with.

    Raises:
        AutogateError: the model was not prepared, or its gates move by themselves.
    """
    bank = gates(model)
    if bank.follows:
        raise AutogateError(
            "its gates move with the optimizer's step by themselves.",
            where=type(unwrap(model)).__name__,
            remedy="Leave autogate.step out, or call prepare(..., hooks=False).",
        )
    bank.step(lr)


def summary(model: nn.Module) -> Summary:
    """FLOPs, parameters and channels left of a prepared model, and what is pinned and why; print it.

    Alphas that were set by hand count, whether or not the model has run since.

        >>> import timm, torch, autogate
        >>> model = autogate.prepare(timm.create_model("resnet18"), flops=0.5)
        >>> found = autogate.summary(model)
        >>> found.all_flops, found.all_params, found.reach
        (1814073344.0, 11689512, 1.0)

    Args:
        model: as `prepare` returned it; a compiled or distributed wrapper is looked through.

    Raises:
        AutogateError: the model was not prepared.
    """
    return summarise(unwrap(model), gates(model))


@locked
def finalize(
    model: M, example_inputs: Any = None, *, optimizer: Optimizer | Iterable[Optimizer] | None = None,
    warn: bool = True,
) -> M:  # fmt: skip
    """Take the closed channels out of a prepared model; its outputs stay what they were.

    The slim model is the same object, of plain layers: every tensor is sliced, the sizes that modules hold
    follow, and no trace of gates is left. It is run on the example inputs before and after. Autocast that
    Accelerate has put around the model's forward is taken off: what comes back is the model that it was given.
    Where it raises, the model is as it was, its gates still there.

    Once the targets are met (`gates(model).progress().settled`) nothing is left to be learned about channels, and what
    training follows costs less in the slim model. Give the optimizer, and it goes on with that:

        >>> import timm, torch, autogate
        >>> model = autogate.prepare(timm.create_model("resnet18"), flops=0.5)
        >>> optimizer = torch.optim.AdamW(model.parameters())
        >>> with torch.no_grad():
        ...     autogate.gates(model).alpha[:1000] = 0
        >>> slim = autogate.finalize(model, optimizer=optimizer, warn=False)
        >>> {id(p) for p in slim.parameters()} == {id(p) for p in optimizer.param_groups[0]["params"]}
        True

    Args:
        model: as `prepare` returned it; a compiled or distributed wrapper is looked through.
        example_inputs: inputs to check the outputs on; those that `prepare` had, if None.
        optimizer: the one that trains the model, or several. The slim parameters take the places of the model's in
            it, in the same groups, and momentum and moments are slimmed like them. Call this between two steps.
        warn: warn when the budget has not been met.

    Raises:
        AutogateError: no gates, a weight or gate that is not finite, a layer that was changed since
            `prepare`, or a model sharded by FSDP2 (the message tells how to gather it); an optimizer that trains
            nothing of the model.
        SurgeryError: a module's forward can't be rewritten for this pattern of channels.
        VerificationError: the outputs would differ by more than `finalizing.TOLERANCE`, and not by the rounding
            of float32 alone: in float64 too.
    """
    model, bank = unwrap(model), gates(model)
    check_not_sharded(model)
    check_finite(model)
    optimizers = () if optimizer is None else as_optimizers(optimizer, model)
    bank.fold()
    origin: PrepareRecord = bank.origin
    given = None if example_inputs is None else as_call(example_inputs, model)
    inputs = origin.inputs_for(model) if given is None else fitted(given, model)
    progress = bank.progress()
    before = _parameters(model)
    done = slim_verified(model, bank, inputs)
    replacements = parameter_replacements(before, _parameters(model), kept_by_side(done.kept))
    for one in optimizers:
        replace_parameters(one, replacements)
    missed = _missed(progress, bank.schedule.tolerance)
    if warn and missed:
        warnings.warn(
            f"finalized at {missed}: {progress.step} of {progress.steps} steps were taken",
            BudgetNotMetWarning,
            stacklevel=3,
        )
    return model


def _parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    return dict(model.named_parameters(remove_duplicate=False))


def _missed(progress: Progress, tolerance: float) -> str:
    """Shares that are above their targets, by more than a settled run may end above them."""
    above = tolerance if progress.settled else 0.0
    return " and ".join(
        f"{share:.1%} of the {name} for a target of {progress.targets[name]:.1%}"
        for name, share in progress.shares.items()
        if share > progress.targets[name] + above
    )


def _replace_shortcuts(model: nn.Module, options: AnalysisOptions, undo_log: UndoLog) -> tuple[Shortcut, ...]:
    shortcuts = options.shortcuts
    if shortcuts == "shared":
        return ()
    if shortcuts != "conv":
        paths = [path for path, _ in model.named_modules() if path]
        for path in (shortcuts,) if isinstance(shortcuts, str) else shortcuts:
            if path not in paths:
                wrong = f"shortcuts is {path!r}" if isinstance(shortcuts, str) else f"shortcuts names {path!r}"
                raise AutogateError(
                    f"{wrong}, which is no module of it.",
                    where=type(model).__name__,
                    remedy=did_you_mean(path, ["shared", "conv", *paths]),
                )
    wanted = run_eval(model, *options.inputs)
    replaced = add_shortcut_convolutions(model, options, undo_log)
    if not replaced:
        warnings.warn(
            f"{type(model).__name__}: shortcuts={shortcuts!r} changed nothing, for no identity shortcut in it alone "
            "couples channels that may go",
            stacklevel=4,
        )
        return ()
    verify(model, options.inputs, wanted, "the model with convolutions on its shortcuts")
    return replaced


def _check_model(model: Any) -> None:
    where = type(model).__name__
    if not isinstance(model, nn.Module):
        raise AutogateError("it is not a torch.nn.Module.", where=where, remedy="Give the model itself.")
    if BANK in model._modules:
        raise AutogateError("it is prepared already.", where=where, remedy="Train it, or finalize it first.")
    if hasattr(model, BANK):
        raise AutogateError(f"it has an attribute called {BANK!r}.", where=where, remedy="Rename that.")
    if has_shards(model):
        raise AutogateError(
            "its parameters are sharded.", where=where, remedy="Prepare the model first, then call fully_shard."
        )
    if isinstance(model, jit.ScriptModule):
        raise AutogateError(
            "torch.jit has compiled it.", where=where, remedy="Prepare and finalize the model first, then script it."
        )
    if is_wrapped(model):
        raise AutogateError(
            "it is a wrapper around the model.", where=where, remedy="Prepare the model first, then compile or wrap it."
        )


def _gated_within(model: Any) -> str | None:
    """Path of a prepared module that the model holds, a LightningModule's network for instance."""
    modules = model.named_modules() if isinstance(model, nn.Module) else ()
    return next((path for path, module in modules if isinstance(module._modules.get(BANK), GateBank)), None)
