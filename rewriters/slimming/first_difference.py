"""Find the module in which a slim model first computes something else than the gated one.

Both run on the same inputs. What each module is called with and returns must be equal in the channels that stay, whose
labels say which they are. The first value that isn't tells whose code made it: a module's own if it returns the value,
its parent's if it is called with it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from rewriters.analysis import Analysis
from rewriters.forwards import LabelMask, labelled_dims
from rewriters.labelling import Labelled
from rewriters.outputs import relative_error, run_eval, run_train
from rewriters.recording import ModuleCall, RunningModules, tensors_of

Key = tuple[str, int, str]
Inputs = tuple[tuple[Any, ...], Mapping[str, Any]]


class ValuesOfModules:
    """What the modules of a gated model are called with and return, without the dead channels.

    Args:
        model: the gated model.
        analysis: of that model.
        live: the classes that stay, bool of shape (classes,).
        inputs: what it runs on, by position and by name.
        training: whether it runs in train mode.
        number: which of the example inputs they are, or like.
    """

    def __init__(
        self,
        model: nn.Module,
        analysis: Analysis,
        live: Tensor,
        inputs: Inputs,
        training: bool = False,
        number: int = 0,
    ) -> None:
        self._known = analysis.labelling.by_tensor()
        self._mask = analysis.label_mask(live)
        self._calls = _numbered(analysis.recorded[number][-1 if training else 0].calls())
        self._values: dict[Key, list[Tensor | None]] = {}
        self._run = run_train if training else run_eval
        with RunningModules(model, self._note).followed():
            self._run(model, *inputs)

    def _note(self, path: str, number: int, end: str, value: Any) -> None:
        call = self._calls.get((path, number))
        if call is None or end == "failed":
            return
        recorded = tensors_of((call.args, call.kwargs) if end == "input" else call.output)
        found = tensors_of(value)
        if len(recorded) == len(found):
            labels = [self._known.get(id(tensor)) for tensor in recorded]
            self._values[path, number, end] = [
                _slimmed(tensor, own, self._mask) for tensor, own in zip(found, labels, strict=True)
            ]

    def first_difference(self, slim: nn.Module, inputs: Inputs, allowed: float) -> str | None:
        """Path of the module whose own code first makes a value that differs; None if none does.

        Args:
            slim: the slim model.
            inputs: what the gated model ran on; if the slim one raises, the module that failed is the one.
            allowed: the largest relative error that passes.
        """
        different: list[str] = []

        def compare(path: str, number: int, end: str, value: Any) -> None:
            wanted = self._values.get((path, number, end))
            if different or wanted is None:
                return
            found = tensors_of(value)
            if len(found) != len(wanted) or any(map(lambda a, b: _differ(a, b, allowed), found, wanted)):
                different.append(path if end == "output" or not modules.running else modules.running[-1])

        modules = RunningModules(slim, compare)
        try:
            with modules.followed():
                self._run(slim, *inputs)
        except Exception as error:
            different.append(modules.failed_in(error))
        return different[0] if different else None


def _numbered(calls: Any) -> Mapping[tuple[str, int], ModuleCall]:
    found: dict[tuple[str, int], ModuleCall] = {}
    times: dict[str, int] = {}
    for call in calls:
        number = times[call.path] = times.get(call.path, -1) + 1
        found[call.path, number] = call
    return found


def _slimmed(tensor: Tensor, labels: Labelled | None, mask: LabelMask) -> Tensor | None:
    """A copy of the channels that stay; None if the labels are of a tensor of another size along channels."""
    if labels is None or labels.ndim != tensor.ndim:
        return None
    if any(labels.shape[dim] != tensor.shape[dim] for dim in labelled_dims(labels)):
        return None
    return mask.slim(tensor.detach(), replace(labels, shape=tuple(tensor.shape))).clone()


def _differ(found: Tensor, wanted: Tensor | None, allowed: float) -> bool:
    if wanted is None:
        return False
    return found.shape != wanted.shape or relative_error([found], [wanted]) > allowed
