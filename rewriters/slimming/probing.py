"""Ask a model what the example inputs leave open (`probe_inputs.py`), and note what it returns."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import nn

from rewriters.outputs import Outputs
from rewriters.recording import attributes_preserved, modules_of
from rewriters.slimming.dry_run import shapes_on_meta
from rewriters.slimming.probe_inputs import Probe, Probes
from rewriters.slimming.trial_inputs import Inputs

T = TypeVar("T")


@dataclass(frozen=True)
class OutputShapes:
    """The shapes that a model returns, run without values: in place of `Outputs` where a run takes long."""

    shapes: Sequence[torch.Size]

    @classmethod
    def of(cls, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> OutputShapes:
        return cls(shapes_on_meta(model, args, kwargs))

    def error(self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], *_: Any) -> float:
        """0 if the changed model returns tensors of the same shapes, else infinite."""
        return 0.0 if shapes_on_meta(model, args, kwargs) == self.shapes else float("inf")


@dataclass(frozen=True)
class Answer(Generic[T]):
    """A question whose inputs a model takes.

    Attributes:
        probe: the question.
        inputs: its inputs.
        found: what was found by running the model.
    """

    probe: Probe
    inputs: Inputs
    found: T


def answers(model: nn.Module, inputs: Inputs, questions: Probes, run: Callable[[Probe, Inputs], T]) -> list[Answer[T]]:
    """Run a model for each question, as `run` does; where that raises, its inputs are none that the model takes."""
    found: list[Answer[T]] = []
    probe = next(questions, None)
    while probe is not None:
        try:
            given = probe.change(inputs)
            with attributes_preserved(modules_of(model)):
                found.append(Answer(probe, given, run(probe, given)))
            taken = True
        except Exception:  # of the user's own code
            taken = False
        try:
            probe = questions.send(taken)
        except StopIteration:
            probe = None
    return found


def finite(outputs: Outputs) -> bool:
    """Whether all of them are numbers: others can't be compared."""
    return all(bool(value.isfinite().all()) for value in outputs.values)
