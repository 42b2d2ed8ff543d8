"""The verbs: `prepare`, `gates`, `step`, `summary` and `finalize`."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import Any, Literal, TypeVar

from torch import nn
from torch.optim import Optimizer

from autogate.budget import ResourceMaker
from autogate.gating import BANK, GateBank, check_preparable, gated_within, optimizers_of, way_out
from autogate.inputs import as_calls, dtype_of_parameters, fitted
from autogate.inspection import AdaptiveSummary, Summary, summarise, summarise_adaptive, summarise_slim
from autogate.lock import locked
from autogate.methods import Learner, Method, as_method, budget_of
from autogate.naming import Ignored, named_by
from autogate.saliency import check_not_adaptive, saliency_of
from autogate.skipping import finalize_adaptive
from autogate.slim import (
    AnalysisOptions,
    PrepareRecord,
    Slimming,
    as_optimizers,
    check_finite,
    check_not_sharded,
    history_of,
    parameters_of,
    prepared_analysis,
    signs_of_collapse,
    slim_unverified,
    slim_verified,
    take_along,
)
from autogate.steering import Bounds, exceeded, read_limits
from autogate.switching import check_one_width
from autogate.wrappers import child_of, unwrap
from rewriters import AutogateError, UndoLog

M = TypeVar("M", bound=nn.Module)


class BudgetNotMetWarning(UserWarning):
    """The model was finalized before its gates had met the budget."""


class CollapseWarning(UserWarning):
    """A layer of the model is left with one channel or none, or its outputs don't depend on its inputs any more."""


_FOR_LIKE_INPUTS = (
    "Give examples of all kinds (autogate.Examples), or probe=False if it is only run on inputs like these. Put the "
    "body of a loop over frames, parts or entries into a module of its own."
)


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
    ignore: Ignored = (),
    shortcuts: Literal["shared", "conv"] | Iterable[str] = "shared",
    hooks: bool = True,
    embed: bool = True,
    probe: bool = True,
    method: Method | None = None,
    limits: Mapping[str, Bounds] | None = None,
) -> M:
    """Add gates to `model`. While you train it, they learn which channels it can do without.

    Train the prepared model in any training loop, then call `finalize`. No number in the model changes. The gates are
    stored multiplied into the kernels, and move after each step of the optimizer that trains the kernels (see
    `GateBank`). Except for norms across channels (see `embed`) and `shortcuts="conv"`, the forward runs as before.

        >>> import timm, torch, autogate
        >>> model = timm.create_model("resnet18", num_classes=10)
        >>> model = autogate.prepare(model, flops=0.5, steps=1000)
        >>> autogate.gates(model).alpha.shape
        torch.Size([2880])

    Args:
        model: any module; the same object is returned. Prepare it before you compile it or wrap it for distributed
            training.
        example_inputs: inputs that the model can be run on: a tensor, a tuple of positional arguments or a dict of
            keyword arguments, or several of these (`Examples`) if the forward takes other ways for other inputs. A timm
            model needs none. Give a batch of two or more samples, so that the batch dimension can't be mistaken for
            another dimension of size 1.
        flops: share of the model's FLOPs (multiply-adds of convolutions and linear layers) to keep, in (0, 1];
            0.5 if no budget is given. If several budgets are given, all of them are met.
        params: share of the model's parameters to keep.
        activations: share of the activation bytes to keep (outputs of convolutions and linear layers, one sample).
        latency: share to keep of the time that one sample takes on this machine. Each layer is timed at a grid of
            widths. This takes a while the first time; the timings are kept on disk (see `autogate.budget.timing`).
        resources: shares of resources of your own, keyed by their class (see `autogate.Resource`).
        steps: number of optimizer steps in the training that follows. The budget is reached within these steps, and
            the remaining ones are plain training. 10,000 if None.
        round_to: a layer that loses channels ends with a multiple of this number, which fast GPU kernels prefer.
        ignore: layers whose channels all stay, one or several: paths of modules or names of parameters, with wildcards
            if you like (`"blocks.*.attn"`), modules themselves, or types of modules (`nn.LayerNorm`).
        shortcuts: "shared": the channels that an identity shortcut's residual add couples (those of a whole stage)
            are kept or removed together. "conv": each such shortcut becomes a 1x1 convolution, initialised to the
            identity, so that every block has a width of its own (Yang et al., "Non-uniform DNN Structured Subnets
            Sampling for Dynamic Inference", section IV.A.2). The convolutions cost FLOPs, which count in what is
            left; the share is relative to the model without them. A list of module paths selects some shortcuts.
            The new kernels are parameters: build the optimizer after prepare.
        hooks: whether gates move with every step of the optimizer that trains the kernels, through PyTorch's global
            step hooks. If False, call `autogate.step(model, lr=...)` after each step.
        embed: whether norms across channels (LayerNorm, GroupNorm, RMSNorm, GRN) may lose channels: the embedding of a
            transformer, the residual stream of a ConvNeXt. While gates train, such a norm takes its statistics over
            the live channels. If False, these channels stay.
        probe: whether to slim the model once on trial. A module that computes something else keeps its channels, also
            if it does for three samples, one pixel or token more, or optional arguments left out. A forward that
            takes another way for these is rewritten for both (see `Examples`).
        method: what decides which channels die: a frozen value with its settings, such as `autogate.GDP(reach=0.2)`.
            `autogate.GDP()` if None.
        limits: bounds on the share of their channels that layers keep, by the path of a layer or a stage, the name of a
            parameter, or a glob of these: `{"layer1": 0.8, "layer4.*.conv2": (0.25, 0.75)}`. One number is the least
            share, a pair the least and the most. They bound the channels that a layer makes; of a layer whose outputs
            all stay, such as the classifier, those that it reads. 1.0 is what `ignore` does.

    Raises:
        AutogateError: the model can't be analysed, none of its channels can be removed, a share is out of reach, or
            an argument is wrong. The message says where, and what to do. The model is left as it was.
    """
    check_not_adaptive(model)
    check_preparable(model)
    check_one_width(model)
    method = as_method(method)
    shares = budget_of(
        method, flops=flops, params=params, activations=activations, latency=latency, resources=resources
    )
    bounds = read_limits(model, limits or {})
    kept = [tensor for limit in bounds if limit.least == 1 for tensor in limit.tensors]
    ignored = dict.fromkeys([*named_by(model, ignore), *kept], "the caller asked for it")
    inputs, *others = as_calls(example_inputs, model)
    options = AnalysisOptions(
        inputs, ignored, shortcuts if isinstance(shortcuts, str) else tuple(shortcuts), embed, tuple(others)
    )
    undo_log = UndoLog()
    try:
        analysis, options, replaced = prepared_analysis(model, options, probe, undo_log)
        if analysis.channel_map.size == 0:
            raise AutogateError(
                f"none of its channels can be removed. {analysis.channel_map.why_pinned()}",
                where=type(model).__name__,
                remedy=_FOR_LIKE_INPUTS if options.refused or len(options.others) > len(others)
                else way_out(model, bool(ignored)),
            )  # fmt: skip
        added = {shortcut.weight for shortcut in replaced.shortcuts}
        targets = shares.targets(model, analysis.channel_map, options.inputs, added)
        origin = PrepareRecord(options, dtype_of_parameters(model), *replaced)
        learner = Learner.of(
            analysis.channel_map, targets, method, steps=steps, round_to=round_to,
            limits=[limit for limit in bounds if limit.least < 1],
        )  # fmt: skip
        bank = GateBank(model, analysis.channel_map, learner, origin, added, hooks)
    except BaseException:
        undo_log.undo()
        raise
    model.add_module(BANK, bank)
    return model


def gates(model: nn.Module) -> GateBank:
    """Return the gate bank of a prepared model.

    `bank.alpha`, shape (classes,), has one entry for each class of coupled channels; `bank.where(i)` says where the
    channels of class i are. To prune by a criterion of your own, set entries to zero:

        >>> import timm, torch, autogate
        >>> model = autogate.prepare(timm.create_model("resnet18", num_classes=10))
        >>> bank = autogate.gates(model)
        >>> with torch.no_grad():
        ...     bank.alpha[:100] = 0
        >>> slim = autogate.finalize(model, warn=False)

    Args:
        model: the model that `prepare` returned, or a compiled or distributed wrapper around it.

    Raises:
        AutogateError: the model was not prepared, or is already finalized.
    """
    model = unwrap(model)
    bank = child_of(model, BANK)
    if not isinstance(bank, GateBank):
        check_not_adaptive(model)
        within = gated_within(model)
        raise AutogateError(
            "it has no gates: it was not prepared, or is already finalized.",
            where=type(model).__name__,
            remedy=f"Pass its {within!r}, which has some." if within else "Call autogate.prepare(model) first.",
        )
    bank.kernels()  # if fully_shard has replaced the kernels, the bank notices it here
    return bank


def step(model: nn.Module, *, lr: float) -> None:
    """Move the gates by one step. Call it after the optimizer's step, if you prepared with `hooks=False`.

    It computes what the hooks compute, with the same code. The gradients must still be in `.grad` as backward left
    them (unscaled and clipped, if you do that). An optimizer that writes into the gradients, as SGD with
    `nesterov=True, foreach=True` does, needs the hooks. If the optimizer skipped its step, skip this call too.

        >>> import timm, torch, autogate
        >>> model = timm.create_model("resnet18", num_classes=10)
        >>> model = autogate.prepare(model, steps=1000, hooks=False)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        >>> model(torch.randn(2, 3, 64, 64)).square().mean().backward()
        >>> optimizer.step()
        >>> autogate.step(model, lr=0.05)

    Args:
        model: a model prepared with `hooks=False`, or a compiled or distributed wrapper around it.
        lr: the learning rate of the optimizer's step.

    Raises:
        AutogateError: the model was not prepared, or was prepared with hooks.
    """
    bank = gates(model)
    if bank.follows:
        raise AutogateError(
            "its gates already move with the optimizer's step.",
            where=type(unwrap(model)).__name__,
            remedy="Don't call autogate.step, or prepare the model with hooks=False.",
        )
    bank.step(lr)


@locked
def summary(model: nn.Module) -> Summary | AdaptiveSummary:
    """Summarise a prepared, slim or adaptive model: FLOPs, parameters and channels left, and what is pinned and why.

    Print the result, or take its `table()` or `to_json()`. Alphas that you set by hand count. Of a slim model it tells
    widths before and after, what was removed, and which forwards were rewritten. Of one of `autogate.adaptive`, what an
    image costs on average, and how many channels of each layer are never, sometimes and always used.

        >>> import timm, torch, autogate
        >>> model = autogate.prepare(timm.create_model("resnet18"), flops=0.5)
        >>> found = autogate.summary(model)
        >>> found.all_flops, found.all_params, found.reach
        (1814073344.0, 11689512, 1.0)

    Args:
        model: the model that `prepare`, `finalize`, `adaptive.prepare` or `load` returned, or a compiled or distributed
            wrapper around it.

    Raises:
        AutogateError: the model was neither prepared nor slimmed.
    """
    own = unwrap(model)
    if (bank := saliency_of(own)) is not None:
        return summarise_adaptive(own, bank)
    return gated_summary(model)


def gated_summary(model: nn.Module) -> Summary:
    """As `summary`, of a prepared or slim model.

    Raises:
        AutogateError: it is neither.
    """
    own = unwrap(model)
    if isinstance(own, nn.Module) and BANK not in own._modules and history_of(own) is not None:
        return summarise_slim(own)
    return summarise(own, gates(model))


@locked
def finalize(
    model: M, example_inputs: Any = None, *, optimizer: Optimizer | Iterable[Optimizer] | None = None,
    warn: bool = True, probe: bool = True,
) -> M:  # fmt: skip
    """Remove the dead channels from a prepared model. Its outputs stay what they were.

    The slim model is the same object, made of plain layers: every tensor with dead channels is sliced, the sizes that
    modules store are updated, and no trace of the gates is left. The model is run on the example inputs before and
    after, and the outputs are compared. If finalize raises, the model is as it was, with its gates.

    Once the targets are met (`gates(model).progress().settled`), no more channels die, and the rest of the training
    costs less in the slim model. The optimizers that have trained the model continue with the slim model. Name those
    that have not stepped yet, as after loading a checkpoint:

        >>> import timm, torch, autogate
        >>> model = autogate.prepare(timm.create_model("resnet18"), flops=0.5)
        >>> optimizer = torch.optim.AdamW(model.parameters())
        >>> with torch.no_grad():
        ...     autogate.gates(model).alpha[:1000] = 0
        >>> slim = autogate.finalize(model, optimizer=optimizer, warn=False)
        >>> {id(p) for p in slim.parameters()} == {id(p) for p in optimizer.param_groups[0]["params"]}
        True

    If Accelerate has put autocast around the model's forward, that is removed: you get back the model that you gave to
    Accelerate.

    A model that `autogate.adaptive.prepare` returned keeps all of its channels, and skips what is off for an image (see
    `autogate.adaptive.finalize`, which also removes what no image uses).

    Args:
        model: the model that `prepare` returned, or a compiled or distributed wrapper around it.
        example_inputs: inputs to compare the outputs on; those given to `prepare` if None.
        optimizer: an optimizer that trains the model, or several. In it, and in those that were seen to step with the
            model's parameters since `prepare`, the slim parameters replace the model's, in the same groups, and
            momentum and moments are sliced like their parameters. Call finalize between two steps. With `hooks=False`
            nothing is seen of optimizers: name them all.
        warn: whether to warn if the budget is not met, if a layer is left with one channel or none, and if the outputs
            don't depend on the inputs any more.
        probe: whether to compare the outputs for what the inputs leave open too, if the model takes it: one and three
            samples, one pixel or token more, optional arguments left out. And those of a copy and of a pickle.

    Raises:
        AutogateError: the model has no gates; a weight or gate is not finite; a layer was changed since `prepare`; the
            model is sharded by FSDP2 (the message says how to gather it); or an optimizer trains no parameter of the
            model.
        SurgeryError: a module's forward can't be rewritten for this pattern of channels.
        VerificationError: the outputs would differ by more than the tolerance (1e-5 of their size in float32; see
            `rewriters.outputs.TOLERANCE`), and not by float32's rounding alone: they differ in float64 too.
    """
    check_one_width(unwrap(model))
    if (choosing := saliency_of(unwrap(model))) is not None:
        return finalize_adaptive(unwrap(model), choosing, example_inputs, warn=warn)
    model, bank = unwrap(model), gates(model)
    check_not_sharded(model)
    check_finite(model)
    optimizers = as_optimizers([*_listed(optimizer), *optimizers_of(bank)], model)
    bank.fold()
    origin: PrepareRecord = bank.origin
    given = None if example_inputs is None else as_calls(example_inputs, model)
    calls = origin.calls_for(model) if given is None else tuple(fitted(call, model) for call in given)
    missed = _missed(bank)
    if warn and missed:  # before anything is done: the caller may have turned warnings into errors
        warnings.warn(missed, BudgetNotMetWarning, stacklevel=3)
    if warn and (signs := signs_of_collapse(model, bank.channel_map, bank.live.cpu(), calls[0])):
        remedy = "Ask for a larger share, or keep layers with prepare(..., ignore=[...])."
        warnings.warn(f"too much has died: {signs}. {remedy}", CollapseWarning, stacklevel=3)
    before = parameters_of(model)
    done = slim_verified(model, bank, calls, probe)
    take_along(optimizers, before, model, done)
    return model


@locked
def finalize_as(model: M, slimming: Slimming, *, optimizer: Optimizer | Iterable[Optimizer] | None = None) -> M:
    """Finalize a model as an earlier one was, so that a checkpoint of the slim model can be loaded into it.

    Args:
        model: prepared like the model that was slimmed; its weights and gates don't matter.
        slimming: the record of the earlier model (`autogate.slim.history_of(slim).slimmings[-1]`).
        optimizer: as for `finalize`.

    Raises:
        AutogateError: the channels of the model are coupled in another way. The model is left as it was.
    """
    model, bank = unwrap(model), gates(model)
    optimizers = as_optimizers([*_listed(optimizer), *optimizers_of(bank)], model)
    before = parameters_of(model)
    take_along(optimizers, before, model, slim_unverified(model, bank, slimming))
    return model


def _listed(optimizer: Any) -> list[Any]:
    if optimizer is None:
        return []
    return list(optimizer) if isinstance(optimizer, Iterable) else [optimizer]


def _missed(bank: GateBank) -> str:
    """The shares and limits that are missed, in words; a settled run may end above a share by its tolerance."""
    progress = bank.progress()
    above = bank.schedule.course.tolerance if progress.settled else 0.0
    missed = [
        f"{share:.1%} of the {name} are left, the target is {progress.targets[name]:.1%}"
        for name, share in progress.shares.items()
        if share > progress.targets[name] + above
    ]
    missed += filter(None, [exceeded(bank.learner.groups, bank.channel_map, bank.live.cpu())])
    when = f"finalized before the budget was met, after {progress.step} of {progress.steps} steps"
    return f"{when}: {' and '.join(missed)}" if missed else ""
