"""Carry the slimming out once for a trial pattern, on the live model and undone at once, before training begins.

Labels and rewritten forwards say what can go; the rehearsal is what proves it for code that neither of them
read: an assertion on a width, a field nobody knows. The slimmed model's forward is recorded like any other
(nothing is computed); a module that refuses keeps its channels.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.utils._pytree import tree_leaves

from rewriters.analysis import Analysis, pin_call, samples_in
from rewriters.capture import capture
from rewriters.errors import AutogateError, SurgeryError
from rewriters.journal import Journal
from rewriters.preserving import set_modes
from rewriters.slimming import apply, plan
from rewriters.trials import trial_pattern

_SEED = 2


def rehearse(
    model: nn.Module, analysis: Analysis, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None = None
) -> Analysis:
    """`analysis` with everything pinned that would not survive a slimming; the model is as it was.

    A random pattern of classes is taken out of the live model, which is run on fake tensors and then restored.

    Args:
        model: as it was analysed.
        analysis: changed in place where something has to be pinned.
        args: example inputs by position.
        kwargs: example inputs by name.

    Raises:
        SurgeryError: a module refuses although all its channels stay.
    """
    pinned: set[str] = set()
    while analysis.channel_map.size:
        refused = _refusal(model, analysis, args, kwargs)
        if refused is None:
            return analysis
        path, error = refused
        while path in pinned and path:  # its own channels stay and it still refuses: what feeds it, then
            path = path.rpartition(".")[0]
        if path in pinned:
            raise SurgeryError(f"cannot run with fewer channels ({error})", where=path) from error
        pinned.add(path)
        pin_call(analysis, path, f"its forward refuses fewer channels ({error})")
        analysis.settle(samples_in(args, kwargs))
    return analysis


def _refusal(
    model: nn.Module, analysis: Analysis, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None
) -> tuple[str, Exception] | None:
    """Path of the module that fails in the rehearsal, with its error; None where all goes well."""
    journal = Journal()
    modes = set_modes(model, False)
    try:
        channel_map = analysis.channel_map
        live = channel_map.survivors(trial_pattern(channel_map.size, _SEED))  # no branch comes to nothing
        slim = plan(model, analysis, live, args, kwargs)
        apply(model, slim, journal, with_values=False)
        recorded = capture(model, args, kwargs)
    except AutogateError as error:
        return error.where, error
    finally:
        journal.undo()
        set_modes(model, modes)
    before = [value.shape for value in tree_leaves(analysis.captures[0].root.output) if hasattr(value, "shape")]
    after = [value.shape for value in tree_leaves(recorded.root.output) if hasattr(value, "shape")]
    return None if before == after else ("", SurgeryError("its outputs change their shapes"))
