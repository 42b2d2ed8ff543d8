"""Compare values before training: slim the live model for a trial pattern, run it, compare it with the gated one.

The dry run shows that a slim model runs; this shows that it computes the same. A random half of the classes is dead.
Weights that must die are zero in copies, and all is undone. What differs by more than rounding is told apart in float64
and then bisected to the module whose code makes the first value that differs.

Where a forward had to be rewritten, the model is also asked what the example leaves open (`probe_inputs.py`). Others
run their own code, which takes sizes as they come.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from rewriters.analysis import Analysis, pin_call
from rewriters.errors import AutogateError
from rewriters.interrupts import let_signals_in
from rewriters.recording import collect, named_tensors, tensors_of
from rewriters.slimming.probe_inputs import Probe
from rewriters.slimming.trial import Compared, Trial
from rewriters.slimming.trial_inputs import Inputs

_MOST_PARAMETERS = 500_000_000
"""Copies of the kernels of larger models may not fit into memory."""


@dataclass(frozen=True)
class Refused:
    """A module whose channels are kept because its slim forward gave other values.

    Attributes:
        path: the module.
        reason: what was wrong.
        whole: whether all that is in the module is kept, and not only what its own forward touches.
    """

    path: str
    reason: str
    whole: bool = False


@dataclass(frozen=True)
class Checked:
    """What a check of values found.

    Attributes:
        compared: whether values could be compared.
        refused: the first module whose slim forward gave other values; None if none did.
        asked: the number of the example and the question that showed it; None if the example itself did.
        takes_other_way: whether a guard refused that question, so that the forward may be traced for it too.
    """

    compared: bool
    refused: Refused | None = None
    asked: tuple[int, Probe] | None = None
    takes_other_way: bool = False

    @property
    def fine(self) -> bool:
        return self.compared and self.refused is None


def pin_refused(analysis: Analysis, refused: Iterable[Refused], samples: int) -> None:
    """Pin the channels of modules that an earlier check of values found; costs are for one of `samples`."""
    for one in refused:
        pin_call(analysis, one.path, one.reason)
        if one.whole:
            under = f"{one.path}." if one.path else ""
            names = {side.tensor for side in analysis.labelling.space.blocks}
            analysis.labelling.pin_tensors([name for name in names if name.startswith(under)], one.reason)
    analysis.settle(samples)


def check_values(
    model: nn.Module, analysis: Analysis, examples: Sequence[Inputs], known: Sequence[Refused] = (),
    traced: Sequence[Collection[str] | None] = (),
) -> Checked:  # fmt: skip
    """Find the first module whose slim forward gives other values than the gated one.

    Nothing is compared if tensors have no values (on the meta device), or if one run would take too long.

    Args:
        model: as it was analysed, with its statistics over live channels placed. It and all generators of random
            numbers are afterwards as before.
        analysis: of that model.
        examples: the example inputs that it was analysed with, by position and by name.
        known: what was found before, and is pinned in `analysis`.
        traced: for each example the questions (`Probe.what`) for which others were added; None asks nothing of it.
    """
    if not analysis.channel_map.size or _too_large(model) or not _has_values(model, examples):
        return Checked(compared=False)
    trial, compared = Trial(model, analysis), True
    for training in (False, True) if analysis.trains_otherwise else (False,):
        for number, example in enumerate(examples):
            let_signals_in()
            done = traced[number] if number < len(traced) else ()
            found = trial.found(number, example, training, done)
            if trial.plan is not None and trial.plan.forwards:
                collect()
            if found is not None and found.reason:
                return _refusing(found, number, known, done or ())
            compared &= found is not None or training  # a forward may want targets to train
    return Checked(compared)


def _refusing(found: Compared, number: int, known: Sequence[Refused], traced: Collection[str]) -> Checked:
    refused, probe = _escalated(found.path or "", found.reason, known), found.probe
    if probe is None:
        return Checked(True, refused)
    return Checked(True, refused, (number, probe), found.guarded and not probe.beyond and probe.what not in traced)


def _escalated(path: str, reason: str, known: Sequence[Refused]) -> Refused:
    """Pin a module's own forward first, then all in it, then its parent."""
    pinned = {(one.path, one.whole) for one in known}
    while (path, False) in pinned:
        if (path, True) not in pinned:
            return Refused(path, reason, whole=True)
        if not path:
            raise AutogateError(
                f"the slim model would compute something else ({reason}).", remedy="Please report the model."
            )
        path = path.rpartition(".")[0]
    return Refused(path, reason)


def _too_large(model: nn.Module) -> bool:
    parameters = (tensor for tensor in named_tensors(model).values() if isinstance(tensor, nn.Parameter))
    return sum(parameter.numel() for parameter in parameters) > _MOST_PARAMETERS


def _has_values(model: nn.Module, examples: Sequence[Inputs]) -> bool:
    tensors = [*named_tensors(model).values(), *tensors_of(tuple(examples))]
    return not any(tensor.is_meta or isinstance(tensor, FakeTensor) for tensor in tensors)
