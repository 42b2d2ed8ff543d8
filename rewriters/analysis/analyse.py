"""Analyse a model: from a model and example inputs to its channel map.

The steps: capture (`capture_modes.py`), label, trace the forwards that have to be rewritten (`traced_modules.py`),
settle what had to wait, rewrite the traced forwards for trial patterns of dead classes (`trial_rewrites.py`), read off
the channel map. What can't be rewritten is pinned here, before anything is trained, and not found out at the end. The
dry run (`rewriters.dry_run`) then tries a whole slimming.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from torch import nn

from rewriters.analysis.capture_modes import Inputs, capture_larger, capture_modes, samples_in
from rewriters.analysis.result import Analysis
from rewriters.analysis.traced_modules import merge_repeated_calls, trace_size_holders, trace_statistics
from rewriters.analysis.trial_rewrites import pin_unresizable
from rewriters.analysis.unrun_layers import pin_for_unrun_layers
from rewriters.cross_channel import plain_statistics
from rewriters.forwards import patches_held
from rewriters.labelling import (
    Labelling,
    merge_grids,
    pin_ungated_statistics,
    pin_ungated_zeros,
    same_classes,
    tie_recurrent_layers,
)
from rewriters.labelling.rules import Findings
from rewriters.recording import Capture, tensors_at, tensors_of, without_caches


def analyse(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None = None,
    ignore: Mapping[str, str] | None = None, embed: bool = True, others: Sequence[Inputs] = (),
    looping: Collection[str] = (),
) -> Analysis:  # fmt: skip
    """Find the classes of coupled channels of `model`.

    Args:
        model: any module. Nothing in it changes, except for buffers that its forward makes again for inputs of another
            size (a table of positions): the model runs once then. It also runs once if a module in it can't be
            captured. If it takes its statistics over the live channels, it is analysed as if it didn't.
        args: example inputs by position.
        kwargs: example inputs by name.
        ignore: names of parameters and buffers whose channels are all kept, with the reason.
        embed: whether channels that norms across channels include can be removed; if not, they are pinned.
        others: more example inputs, for which the forward may take other ways.
        looping: paths of modules that loop over their inputs as often as these have entries. They keep their own code,
            which takes any number, if it is right once some of their attributes are other numbers.

    Raises:
        CaptureError: the forward fails, or its own control flow depends on the values of tensors.
    """
    with plain_statistics(model), without_caches(model):
        return _analyse(model, args, kwargs, ignore, embed, others, looping)


def _analyse(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None, ignore: Mapping[str, str] | None,
    embed: bool, others: Sequence[Inputs], looping: Collection[str],
) -> Analysis:  # fmt: skip
    first, *more = (capture_modes(model, *inputs) for inputs in ((args, kwargs), *others))
    captures = [captured for one in (first, *more) for captured in one.captures]
    labelling = _labelled(model, captures, ignore, embed)
    if labelling.findings.scattered:
        larger = capture_larger(model, args, kwargs, first.captures)
        alone = _labelled(model, first.captures, ignore, embed) if more else labelling
        if larger and not same_classes(alone, _labelled(model, larger, ignore, embed)):
            labelling.space.notes += labelling.findings.scattered
    trains_otherwise = any(one.trains_otherwise for one in (first, *more))
    analysis = Analysis([one.captures for one in (first, *more)], labelling, trains_otherwise)
    known = labelling.by_tensor()
    with patches_held():
        looking = trace_statistics(model, analysis, known)
        trace_size_holders(model, analysis, known, looking, [(args, kwargs or {}), *others], looping)
    merge_repeated_calls(analysis)
    pin_for_unrun_layers(model, analysis)
    merge_grids(labelling)
    analysis.resized = pin_unresizable(labelling, analysis.traced)
    pin_ungated_statistics(labelling)
    analysis.settle(samples_in(args, kwargs))
    return analysis


def _labelled(model: nn.Module, captures: list[Capture], ignore: Mapping[str, str] | None, embed: bool) -> Labelling:
    """Labels of all values of a captured model, before its forwards are traced."""
    labelling = Labelling(findings=Findings(live=embed))
    for captured in captures:
        labelling.run(captured, counted=captured is captures[0])
    for name, reason in (ignore or {}).items():
        labelling.pin_tensors([name], reason)
    tie_recurrent_layers(labelling, model)
    merge_grids(labelling)
    pin_ungated_zeros(labelling)
    return labelling


def pin_call(analysis: Analysis, path: str, reason: str) -> None:
    """Pin all channels that a module's own code touches, and those of its inputs and outputs."""
    known = analysis.labelling.by_tensor()
    for captured in analysis.captures:
        for call in captured.calls():
            if call.path == path:
                tensors = tensors_of((call.args, call.kwargs, call.output))
                tensors += [tensor for node in call.nodes for tensor in tensors_at(node)]
                analysis.labelling.pin_values(tensors, known, path, "forward", reason)
