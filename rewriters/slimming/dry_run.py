"""Slim the live model for a trial pattern before training begins, run it on meta tensors, and undo everything.

Labels and rewritten forwards say what can be removed. The dry run proves it for code that neither of them has read: an
assertion on a width, a field that nobody knows. Nothing is computed. A module that fails is traced, to be rewritten. If
it still fails, its channels are pinned, and the summary says so now, not at the end of training.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_map_only

from rewriters.analysis import Analysis, Inputs, pin_call, samples_in, trace_calls, trial_pattern
from rewriters.errors import AutogateError, SurgeryError
from rewriters.interrupts import let_signals_in
from rewriters.recording import (
    MetaMode,
    Opaque,
    attributes_preserved,
    capture,
    collect,
    generators_kept,
    in_every_place,
    named_tensors,
    opaque_modules_stubbed,
    set_modes,
    tensors_of,
)
from rewriters.slimming.plan import apply, plan
from rewriters.undo_log import UndoLog

_SEED = 2


def dry_run(
    model: nn.Module, analysis: Analysis, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None = None,
    others: Sequence[Inputs] = (),
) -> Analysis:  # fmt: skip
    """`analysis` with everything pinned that would not survive a slimming; the model is as it was.

    A random pattern of classes is removed from the live model, which runs without data and is then restored.

    Args:
        model: as it was analysed.
        analysis: changed in place where something has to be pinned.
        args: example inputs by position.
        kwargs: example inputs by name.
        others: the other example inputs that it was analysed with.

    Raises:
        SurgeryError: a module fails although all its channels stay.
    """
    pinned: set[str] = set()
    while analysis.channel_map.size:
        refused = _refusal(model, analysis, [(args, kwargs or {}), *others])
        collect()
        if refused is None:
            return analysis
        path, error = refused
        if trace_calls(model, analysis, path):  # rewritten, it may run
            analysis.settle(samples_in(args, kwargs))
            continue
        while path in pinned and path:  # its own channels stay and it still fails: pin those of its parent
            path = path.rpartition(".")[0]
        if path in pinned:
            raise SurgeryError(f"cannot run with fewer channels ({error})", where=path) from error
        pinned.add(path)
        pin_call(analysis, path, f"its forward refuses fewer channels ({error})")
        analysis.settle(samples_in(args, kwargs))
    return analysis


def _refusal(model: nn.Module, analysis: Analysis, examples: Sequence[Inputs]) -> tuple[str, Exception] | None:
    """The path of the module that fails in the dry run, with its error; None if none does."""
    let_signals_in()
    undo_log = UndoLog()
    modes = set_modes(model, False)
    try:
        channel_map = analysis.channel_map
        live = channel_map.survivors(trial_pattern(channel_map.size, _SEED))  # without dead branches
        slim = plan(model, analysis, live, *examples[0])
        collect()
        apply(model, slim, undo_log, with_values=False, compiled=False)
        after = [
            _output_shapes(model, *inputs, captured.opaque)
            for inputs, captured in zip(examples, analysis.in_eval_mode, strict=True)
        ]
    except AutogateError as error:
        return error.where, error
    finally:
        undo_log.undo()
        set_modes(model, modes)
    before = [_shapes(captured.root.output) for captured in analysis.in_eval_mode]
    return None if before == after else ("", SurgeryError("the shapes of its outputs change"))


def _output_shapes(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], opaque: Mapping[str, Opaque]
) -> list[torch.Size]:
    """Shapes of the model's outputs. Raises `CaptureError`.

    The model runs on meta tensors, which takes a fraction of the time of a capture. Some forwards fail on these (they
    ask for a value, or create tensors on a device by name) but can be captured, so a forward that fails is captured.
    Opaque modules don't run: they return tensors of the shapes that they returned when the model was captured.
    """
    try:
        return shapes_on_meta(model, args, kwargs, opaque)
    except Exception:
        return _shapes(capture(model, args, kwargs, opaque).root.output)


def shapes_on_meta(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], opaque: Mapping[str, Opaque] | None = None
) -> list[torch.Size]:
    """Shapes of the model's outputs, run on meta tensors; raises what its forward raises there."""
    real = named_tensors(model)
    metas = {name: torch.empty_like(tensor, device="meta") for name, tensor in real.items()}
    places = in_every_place(model, real, metas)
    meta_args, meta_kwargs = tree_map_only(Tensor, lambda tensor: tensor.to("meta"), (args, dict(kwargs)))
    with (
        attributes_preserved(model.modules()), generators_kept(model), torch.no_grad(),
        opaque_modules_stubbed(model, opaque or {}), MetaMode(),
    ):  # fmt: skip
        return _shapes(functional_call(model, places, meta_args, meta_kwargs, tie_weights=False))


def _shapes(outputs: Any) -> list[torch.Size]:
    return [tensor.shape for tensor in tensors_of(outputs)]
