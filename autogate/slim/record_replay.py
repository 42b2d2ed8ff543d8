"""Carry out a slimming on a live model, note what was done, and carry it out again on the model it began with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from autogate.inputs import Inputs
from autogate.slim import timm_fields as bookkeeping
from autogate.slim.history import (
    ATTRIBUTE,
    History,
    Slimming,
    TensorSpec,
    describe_buffers,
    describe_modules,
    describe_tensors,
    dtype_of,
    history_of,
    kept_by_side,
    kept_indices,
    rewritten,
    write_inputs,
)
from rewriters import (
    ALWAYS,
    Analysis,
    AutogateError,
    ChannelMap,
    Decisions,
    Shortcut,
    UndoLog,
    analyse,
    apply,
    dry_run,
    plan,
    replace_shortcuts,
    restore,
)
from rewriters.cross_channel import plain_statistics
from rewriters.recording import frozen_heap
from rewriters.slimming import like, tensor_slots


class AnalysisOptions(NamedTuple):
    """What `prepare` was asked for, as far as it decides where channels are.

    Attributes:
        inputs: example inputs.
        ignored: names of the tensors whose channels stay, with the reason.
        shortcuts: "shared", "conv" or paths of modules.
        embed: whether channels that statistics look at may go.
    """

    inputs: Inputs
    ignored: Mapping[str, str]
    shortcuts: str | tuple[str, ...] = "shared"
    embed: bool = True


@frozen_heap()
def analyse_with_dry_run(model: nn.Module, options: AnalysisOptions) -> Analysis:
    """The model's channels, with everything pinned that would not survive a slimming."""
    args, kwargs = options.inputs
    return dry_run(model, analyse(model, args, kwargs, options.ignored, options.embed), args, kwargs)


def add_shortcut_convolutions(model: nn.Module, options: AnalysisOptions, undo_log: UndoLog) -> tuple[Shortcut, ...]:
    """1x1 convolutions on those of the model's shortcuts that are asked for."""
    if options.shortcuts == "shared":
        return ()
    within = None if options.shortcuts == "conv" else options.shortcuts
    within = (within,) if isinstance(within, str) else within
    return replace_shortcuts(model, *options.inputs, undo_log, within, options.ignored, options.embed)


def slim_and_record(
    model: nn.Module, analysis: Analysis, live: Tensor, options: AnalysisOptions, shortcuts: tuple[Shortcut, ...],
    undo_log: UndoLog, decided: Decisions | None = None,
) -> Slimming:  # fmt: skip
    """Slim `model` to the classes in `live` (bool, shape (classes,)); it remembers that.

    Args:
        shortcuts: convolutions that stand on its shortcuts.
        decided: what was read off the weights when the same was done before; they aren't looked at then.
    """
    added = [shortcut.path for shortcut in shortcuts]
    with plain_statistics(model):
        before, buffers = describe_tensors(model, added), describe_buffers(model)
        modules = describe_modules(model, added)
    slim_plan = plan(model, analysis, live, *options.inputs, decided)
    slim_plan = restore(model, analysis, slim_plan, shortcuts, decided)
    follow = bookkeeping.widths(model)
    apply(model, slim_plan, undo_log)
    bookkeeping.update(model, follow, undo_log)
    done = Slimming(
        tensors=before,
        buffers=buffers,
        inputs=write_inputs(options.inputs),
        ignored=tuple(options.ignored),
        shortcuts=options.shortcuts,
        embed=options.embed,
        convolutions=tuple(added),
        kept=kept_indices(analysis.channel_map, slim_plan.live),
        branches=slim_plan.decisions.branches,
        selections=slim_plan.decisions.selections,
        rewritten=rewritten(slim_plan),
        removed=tuple(sorted(slim_plan.removed)),
    )
    earlier = history_of(model) or History((), modules, {}, {})
    shapes = {name: spec.shape for name, spec in describe_tensors(model).items()}
    history = History((*earlier.slimmings, done), earlier.dense_modules, describe_modules(model), shapes)
    undo_log.set_attribute(model, ATTRIBUTE, history)
    return done


def replay(model: nn.Module, slimming: Slimming, inputs: Inputs, undo_log: UndoLog) -> None:
    """Slim `model`, which is as the slimmed one was but for its weights, in the same way.

    Args:
        inputs: example inputs on the model's device.

    Raises:
        AutogateError: it is another model, or its channels are coupled otherwise; `undo_log` has what was done.
    """
    _check_tensors(model, slimming.tensors)
    cast(model, {name: spec.dtype for name, spec in slimming.tensors.items()} | dict(slimming.buffers), undo_log)
    ignored = dict.fromkeys(slimming.ignored, "the caller asked for it")
    options = AnalysisOptions(inputs, ignored, slimming.shortcuts, slimming.embed)
    shortcuts = add_shortcut_convolutions(model, options, undo_log)
    _check_same("the convolutions on shortcuts", [one.path for one in shortcuts], list(slimming.convolutions))
    analysis = analyse_with_dry_run(model, options)
    live = _live(analysis.channel_map, slimming)
    decided = Decisions(slimming.branches, slimming.selections)
    done = slim_and_record(model, analysis, live, options, shortcuts, undo_log, decided)
    mine, theirs = kept_by_side(done.kept), kept_by_side(slimming.kept)
    for side in {**theirs, **mine}:
        here, there = (one and (one.size, one.kept) for one in (mine.get(side), theirs.get(side)))
        _check_same(f"what stays of {side}", here, there)
    _check_same("the branches taken out", done.branches, slimming.branches)
    _check_same("the convolutions that became selections", done.selections, slimming.selections)
    _check_same("the modules taken out", done.removed, slimming.removed)


def _live(channel_map: ChannelMap, slimming: Slimming) -> Tensor:
    """Classes none of whose indices was taken out, bool of shape (classes,)."""
    live = torch.ones(channel_map.size, dtype=torch.bool)
    kept = kept_by_side(slimming.kept)
    for side, classes in channel_map.classes.items():
        if side in kept:
            _check_same(f"the length of {side}", len(classes), kept[side].size)
            gone = set(range(len(classes))) - set(kept[side].kept)
            labels = classes[sorted(gone)]
            live[labels[labels != ALWAYS]] = False
    return live


def _check_same(what: str, here: object, there: object) -> None:
    if here != there:
        raise AutogateError(
            f"{what} would not be what it was.",
            remedy="The channels of this model are coupled in another way: its code, or autogate's, has changed since.",
        )


def _check_tensors(model: nn.Module, wanted: Mapping[str, TensorSpec]) -> None:
    different = first_difference(
        {name: spec.shape for name, spec in describe_tensors(model).items()},
        {name: spec.shape for name, spec in wanted.items()},
    )
    if different is not None:
        name, here, there = different
        raise AutogateError(
            f"it is {_shape(here)} in this model and {_shape(there)} in the one that was slimmed.",
            where=name,
            remedy="Give the dense model as it was before it was prepared: same class, same arguments.",
        )


def first_difference(
    here: Mapping[str, object], there: Mapping[str, object]
) -> tuple[str, object | None, object | None] | None:
    """The first name that two mappings have different values for, with both values (None: none)."""
    for name in {**there, **here}:
        if here.get(name) != there.get(name):
            return name, here.get(name), there.get(name)
    return None


def _shape(shape: object | None) -> str:
    return "not there" if shape is None else f"of shape {shape}"


def cast(model: nn.Module, dtypes: Mapping[str, str], undo_log: UndoLog) -> None:
    """Give the named parameters and buffers these dtypes."""
    done: dict[int, Tensor] = {}  # a tensor that stands in several places stays one
    for name, module, own_name, tensor in list(tensor_slots(model)):
        dtype = dtype_of(dtypes[name]) if name in dtypes else tensor.dtype
        if dtype != tensor.dtype:
            if id(tensor) not in done:
                done[id(tensor)] = like(tensor, tensor.detach().to(dtype))
            undo_log.set_tensor(module, own_name, done[id(tensor)])
