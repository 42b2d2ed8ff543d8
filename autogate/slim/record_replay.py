"""Slim a live model and record how, and replay the record on the dense model.

One function slims, for finalize and for loading: `slim_and_record`. All that it depends on is in the record: shapes and
dtypes of the example inputs, what was ignored, which shortcuts were asked for, the live classes. Only two questions
depend on the trained weights, which are absent when the record is replayed: whether a dead branch has the same value at
every position, and whether a shortcut's 1x1 kernel only passes channels on. `rewriters.Decisions` holds the answers.
`plan` and `restore` take them instead of looking at the weights, and constants are zero until their tensors are put in.

Classes have no names, and another version of autogate may number them differently. So the record holds the indices that
stay of every tensor, and a replay makes those classes dead that have a removed index. Then all indices, the removed
branches and the removed modules must be the same as in the record; otherwise the replay is refused, with the name of
what differs.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from autogate.inputs import Inputs
from autogate.slim import timm_fields as bookkeeping
from autogate.slim.history import (
    ATTRIBUTE,
    Analysed,
    History,
    KeptIndices,
    Slimming,
    TensorSpec,
    dead_indices,
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
from autogate.slim.layers import layers_of
from autogate.slim.state_hints import add_state_hint
from rewriters import (
    ALWAYS,
    Analysis,
    AutogateError,
    ChannelMap,
    Decisions,
    Replaced,
    Shortcut,
    UndoLog,
    analyse,
    apply,
    dry_run,
    plan,
    replace_shortcuts,
    restore,
    samples_in,
)
from rewriters.cross_channel import plain_statistics
from rewriters.recording import Kept, frozen_heap, generators_kept, tensor_slots
from rewriters.slimming import Refused, is_under, like, pin_refused


class AnalysisOptions(NamedTuple):
    """The arguments of `prepare` that decide where channels are.

    Attributes:
        inputs: example inputs.
        ignored: names of the tensors whose channels stay, with the reason.
        shortcuts: "shared", "conv" or paths of modules.
        embed: whether channels that cross-channel statistics are taken over can be removed.
        others: more example inputs.
        refused: modules whose channels stay because a check of values found that they'd compute something else.
        looping: modules that loop as often as their inputs have entries, and keep their own code if they can.
        try_slimming: whether the dry run has something to say: a check of values that finds nothing spares it.
        kept: attributes that had no tensors yet when forwards were recorded, which set them for later calls.
    """

    inputs: Inputs
    ignored: Mapping[str, str]
    shortcuts: str | tuple[str, ...] = "shared"
    embed: bool = True
    others: tuple[Inputs, ...] = ()
    refused: tuple[Refused, ...] = ()
    looping: tuple[str, ...] = ()
    try_slimming: bool = True
    kept: tuple[Kept, ...] = ()

    def on(self, calls: Sequence[Inputs]) -> AnalysisOptions:
        """The same for these example inputs."""
        return self._replace(inputs=calls[0], others=tuple(calls[1:]))


@frozen_heap()
def analyse_channels(model: nn.Module, options: AnalysisOptions) -> Analysis:
    """Analyse the model's channels, and pin whatever the dry run shows can't be slimmed."""
    args, kwargs = options.inputs
    analysis = analyse(model, args, kwargs, options.ignored, options.embed, options.others, options.looping)
    if options.refused:
        pin_refused(analysis, options.refused, samples_in(args, kwargs))
    return dry_run(model, analysis, args, kwargs, options.others) if options.try_slimming else analysis


def add_shortcut_convolutions(model: nn.Module, options: AnalysisOptions, undo_log: UndoLog) -> Replaced:
    """Put 1x1 convolutions on those of the model's identity shortcuts that `options` ask for."""
    if options.shortcuts == "shared":
        return Replaced((), {})
    within = None if options.shortcuts == "conv" else options.shortcuts
    within = (within,) if isinstance(within, str) else within
    (args, kwargs), ignored = options.inputs, options.ignored
    with generators_kept(model):  # new layers are drawn
        return replace_shortcuts(model, args, kwargs, undo_log, within, ignored, options.embed, options.others)


def slim_and_record(
    model: nn.Module, analysis: Analysis, live: Tensor, options: AnalysisOptions, shortcuts: tuple[Shortcut, ...],
    undo_log: UndoLog, decided: Decisions | None = None, method: str = "",
) -> Slimming:  # fmt: skip
    """Slim `model` to the live classes, and store a record of it on the model.

    Args:
        model: the model to slim, without gates.
        analysis: its channels.
        live: the classes that stay, bool, shape (classes,).
        options: what the analysis was made with.
        shortcuts: convolutions that were put on its shortcuts.
        undo_log: takes all changes.
        decided: decisions from an earlier slimming; the weights aren't looked at then.
        method: what decided which channels died, for the record.

    Returns:
        The record.
    """
    before, modules = describe(model, options, shortcuts)
    params = sum(p.numel() for name, p in model.named_parameters() if not is_under(name, set(before.convolutions)))
    slim_plan = plan(model, analysis, live, *options.inputs, decided)
    slim_plan = restore(model, analysis, slim_plan, shortcuts, decided)
    follow = bookkeeping.widths(model)
    apply(model, slim_plan, undo_log)
    bookkeeping.update(model, follow, undo_log)
    done = Slimming(
        **vars(before),
        kept=kept_indices(analysis.channel_map, slim_plan.live),
        dead=dead_indices(analysis.channel_map, slim_plan.dead),
        branches=slim_plan.decisions.branches,
        selections=slim_plan.decisions.selections,
        rewritten=rewritten(slim_plan),
        removed=tuple(sorted(slim_plan.removed)),
        layers=layers_of(analysis.channel_map, slim_plan.live.cpu()),
        params=params,
        method=method,
    )
    earlier = history_of(model) or History((), modules, {}, {})
    shapes = {name: spec.shape for name, spec in describe_tensors(model).items()}
    history = History((*earlier.slimmings, done), earlier.dense_modules, describe_modules(model), shapes)
    undo_log.set_attribute(model, ATTRIBUTE, history)
    add_state_hint(model, undo_log)
    return done


def describe(
    model: nn.Module, options: AnalysisOptions, shortcuts: tuple[Shortcut, ...], excluded: Collection[str] = ()
) -> tuple[Analysed, dict[str, str]]:
    """A model as it was given to `prepare`, for a record, and its modules as text (`describe_modules`).

    Args:
        model: the model.
        options: how it was analysed.
        shortcuts: the convolutions that were put on its shortcuts.
        excluded: other modules that it hasn't had before.
    """
    added = [shortcut.path for shortcut in shortcuts]
    with plain_statistics(model):
        tensors = describe_tensors(model, [*added, *excluded])
        buffers = {name: dtype for name, dtype in describe_buffers(model).items() if not is_under(name, set(excluded))}
        modules = describe_modules(model, [*added, *excluded])
    described = Analysed(
        tensors=tensors,
        buffers=buffers,
        inputs=write_inputs(options.inputs),
        ignored=tuple(options.ignored),
        shortcuts=options.shortcuts,
        embed=options.embed,
        convolutions=tuple(added),
        others=tuple(map(write_inputs, options.others)),
        refused=tuple((one.path, one.whole) for one in options.refused),
        looping=options.looping,
    )
    return described, modules


def replay(model: nn.Module, slimming: Slimming, calls: Sequence[Inputs], undo_log: UndoLog) -> None:
    """Slim `model` as a record says.

    Args:
        model: a model like the one that was slimmed, apart from its weights.
        slimming: the record.
        calls: example inputs on the model's device, all those that `prepare` got.
        undo_log: takes all changes, also if this raises.

    Raises:
        AutogateError: it is another model, or its channels are coupled in another way.
    """
    options = as_described(model, slimming, calls, undo_log)
    shortcuts = add_shortcut_convolutions(model, options, undo_log).shortcuts
    check_same("the set of convolutions on shortcuts", [one.path for one in shortcuts], list(slimming.convolutions))
    analysis = analyse_channels(model, options)
    slim_as_recorded(model, analysis, slimming, options, shortcuts, undo_log)


def as_described(model: nn.Module, record: Analysed, calls: Sequence[Inputs], undo_log: UndoLog) -> AnalysisOptions:
    """Give a model the dtypes of the recorded one. Returns how that was analysed.

    Raises:
        AutogateError: it is another model.
    """
    check_tensors(model, record.tensors)
    both = next((name for name in record.buffers if name in record.tensors), None)
    if both is not None:
        raise AutogateError("the record lists it twice, in the state_dict and outside of it.", where=both)
    cast(model, {name: spec.dtype for name, spec in record.tensors.items()} | dict(record.buffers), undo_log)
    ignored = dict.fromkeys(record.ignored, "the caller asked for it")
    refused = tuple(Refused(path, "its slim forward computed other values", whole) for path, whole in record.refused)
    others = tuple(calls[1:])
    return AnalysisOptions(calls[0], ignored, record.shortcuts, record.embed, others, refused, record.looping)


def slim_as_recorded(
    model: nn.Module, analysis: Analysis, slimming: Slimming, options: AnalysisOptions,
    shortcuts: tuple[Shortcut, ...], undo_log: UndoLog,
) -> Slimming:  # fmt: skip
    """As `slim_and_record`, with the live classes and the decisions of a record: the weights don't matter.

    Raises:
        AutogateError: the channels of the model are coupled in another way than those of the recorded one.
    """
    live = live_classes(analysis.channel_map, slimming.kept, slimming.dead)
    decided = Decisions(slimming.branches, slimming.selections)
    done = slim_and_record(model, analysis, live, options, shortcuts, undo_log, decided)
    check_kept(done.kept, slimming.kept)
    check_same("the set of dead channels that stay", done.dead, slimming.dead)
    check_same("the set of removed branches", done.branches, slimming.branches)
    check_same("the set of shortcut convolutions that became selections", done.selections, slimming.selections)
    check_same("the set of removed modules", done.removed, slimming.removed)
    return done


def live_classes(
    channel_map: ChannelMap, recorded: Collection[KeptIndices], dead: Collection[KeptIndices] = ()
) -> Tensor:
    """The classes that keep all of their indices and aren't dead, bool, shape (classes,).

    Raises:
        AutogateError: a recorded side has another length here.
    """
    live = torch.ones(channel_map.size, dtype=torch.bool)
    kept, stay = kept_by_side(recorded), kept_by_side(dead)
    for side, classes in channel_map.classes.items():
        gone: set[int] = set()
        for one in (found[side] for found in (kept, stay) if side in found):
            check_same(f"the length of {side}", len(classes), one.size)
        gone |= set(range(len(classes))) - set(kept[side].kept) if side in kept else set()
        gone |= set(stay[side].kept) if side in stay else set()
        labels = classes[sorted(gone)]
        live[labels[labels != ALWAYS]] = False
    return live


def check_kept(here: Collection[KeptIndices], recorded: Collection[KeptIndices]) -> None:
    """Raise, with the name of a side, unless the indices that stay are the recorded ones."""
    mine, theirs = kept_by_side(here), kept_by_side(recorded)
    for side in {**theirs, **mine}:
        own, other = (one and (one.size, one.kept) for one in (mine.get(side), theirs.get(side)))
        check_same(f"the set of indices kept of {side}", own, other)


def check_same(what: str, here: object, there: object) -> None:
    """Raise, with `what` as the subject, unless a value is the recorded one."""
    if here != there:
        raise AutogateError(
            f"{what} differs from the one recorded.",
            remedy="The channels of this model are coupled in another way, because its code or autogate's has changed "
            "since. Use the code that the model was slimmed with.",
        )


def check_tensors(model: nn.Module, wanted: Mapping[str, TensorSpec]) -> None:
    """Raise unless a model's tensors have the names and shapes that a record has of them before the slimming."""
    different = first_difference(
        {name: spec.shape for name, spec in describe_tensors(model).items()},
        {name: spec.shape for name, spec in wanted.items()},
    )
    if different is not None:
        name, here, there = different
        raise AutogateError(
            f"it is {_shape(here)} in this model, and {_shape(there)} in the model that was slimmed.",
            where=name,
            remedy="Pass the dense model as it was before prepare: same class, same arguments.",
        )


def first_difference(
    here: Mapping[str, object], there: Mapping[str, object]
) -> tuple[str, object | None, object | None] | None:
    """The first name with different values in two mappings, and both values (None: missing); None if they agree."""
    for name in {**there, **here}:
        if here.get(name) != there.get(name):
            return name, here.get(name), there.get(name)
    return None


def _shape(shape: object | None) -> str:
    return "missing" if shape is None else f"of shape {shape}"


def cast(model: nn.Module, dtypes: Mapping[str, str], undo_log: UndoLog) -> None:
    """Cast the named parameters and buffers to these dtypes."""
    done: dict[int, Tensor] = {}  # a tensor that is in several places stays one tensor
    for name, module, own_name, tensor in list(tensor_slots(model)):
        dtype = dtype_of(dtypes[name]) if name in dtypes else tensor.dtype
        if dtype != tensor.dtype:
            if id(tensor) not in done:
                done[id(tensor)] = like(tensor, tensor.detach().to(dtype))
            undo_log.set_tensor(module, own_name, done[id(tensor)])
