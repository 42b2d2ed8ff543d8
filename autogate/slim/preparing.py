"""What `prepare` finds out of a model: the ways through its forwards, its shortcuts, its channels."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

from autogate.slim.found_ways import FoundWays
from autogate.slim.record_replay import AnalysisOptions, analyse_channels
from autogate.slim.shortcut_convolutions import asked_shortcut_convolutions
from rewriters import Analysis, Replaced, UndoLog
from rewriters.analysis import looping_like
from rewriters.cross_channel import remove_live_statistics
from rewriters.recording import forget, frozen_heap, kept_before, remember
from rewriters.slimming import check_values


class Prepared(NamedTuple):
    """A model's channels.

    Attributes:
        analysis: its channels, some of them pinned because they can't be slimmed.
        options: those for which `analyse_channels` finds the same without a check of values.
        replaced: what became of its identity shortcuts.
    """

    analysis: Analysis
    options: AnalysisOptions
    replaced: Replaced


@frozen_heap()
def prepared_analysis(model: nn.Module, options: AnalysisOptions, probe: bool, undo_log: UndoLog) -> Prepared:
    """Put convolutions on the shortcuts that are asked for, and analyse the model's channels.

    A forward with a convolution on its shortcut takes the ways only that the examples take. So other ways are looked
    for (`probe`) before there are any. Tables that forwards have kept from earlier calls are set aside meanwhile.

    Raises:
        AutogateError: see `autogate.prepare`; what was changed until then is in `undo_log`.
    """
    kept = forget(model, kept_before(model, *options.inputs), undo_log)
    ways = FoundWays(options.inputs, *options.others)
    if probe and options.shortcuts != "shared":
        looking = UndoLog()
        try:
            _without_refused(model, options, probe, looking, ways)
        finally:
            looking.undo()
        ways.close()
    options = options.on(ways.examples)
    replaced = asked_shortcut_convolutions(model, options, undo_log)
    analysis, options = _without_refused(model, options, probe, undo_log, ways)
    remember(model, kept, undo_log)
    return Prepared(analysis, options, replaced)


def _without_refused(
    model: nn.Module, options: AnalysisOptions, probe: bool, undo_log: UndoLog, ways: FoundWays
) -> tuple[Analysis, AnalysisOptions]:
    """Analyse the model's channels, place its statistics over live channels, and pin what can't be slimmed.

    If values are compared (`probe`), the dry run is only needed where that fails: it tells forwards that refuse fewer
    channels, some of which can be rewritten, from those that compute something else. A forward that takes another way
    for inputs which the examples lack keeps its own code, if it loops over them and that is right; else it is analysed
    for them too, as if they had been given.
    """
    options = options._replace(try_slimming=not probe)
    while True:
        analysis = analyse_channels(model, options)
        analysis.place_statistics(model, undo_log)
        found = check_values(model, analysis, ways.examples, options.refused, ways.traced()) if probe else None
        if found is None or found.fine or (options.try_slimming and found.refused is None):
            return analysis, options._replace(kept=analysis.kept)
        remove_live_statistics(model, undo_log)
        if found.refused is not None and found.takes_other_way:
            looping = looping_like(model, analysis, found.refused.path).difference(options.looping)
            if looping:
                options = options._replace(looping=(*options.looping, *sorted(looping)))
                continue
        if not ways.add(model, found) and options.try_slimming and found.refused is not None:
            ways.leave(found)
            options = options._replace(refused=(*options.refused, found.refused))
        options = options.on(ways.examples)._replace(try_slimming=True)
