"""Example inputs that are found by asking a model what the given ones leave open."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from autogate.inputs import Inputs
from rewriters import AutogateError
from rewriters.recording import capture, set_modes
from rewriters.slimming import Checked, Probe

_MOST = 4
"""Each of them is analysed as the given ones are, which takes time."""


@dataclass
class _Way:
    """Inputs, made from example inputs by a question, for which a forward takes another way; None if they are left."""

    of: Inputs
    probe: Probe
    inputs: Inputs | None


class FoundWays:
    """The given example inputs, and those found for other ways through a model's forwards.

    Args:
        given: what the caller gave.
    """

    def __init__(self, *given: Inputs):
        self._given = given
        self._found: list[_Way] = []
        self._closed = False

    @property
    def examples(self) -> tuple[Inputs, ...]:
        """All of them, the given ones first."""
        return (*self._given, *(way.inputs for way in self._found if way.inputs is not None))

    def close(self) -> None:
        """Keep the examples as they are from now on: the model is changed for them."""
        self._closed = True

    def traced(self) -> list[set[str] | None]:
        """For each of the examples the questions that led to others; None if it is larger than a given one only."""
        larger = [way.inputs for way in self._found if way.probe.of_length]
        return [
            None if any(one is example for one in larger) else {w.probe.what for w in self._found if w.of is example}
            for example in self.examples
        ]

    def add(self, model: nn.Module, checked: Checked) -> bool:
        """Add inputs for which a check of values has found another way. Returns whether that can be recorded."""
        if checked.asked is None or not checked.takes_other_way or self._closed or len(self._found) == _MOST:
            return False
        number, probe = checked.asked
        of, modes = self.examples[number], set_modes(model, False)
        try:
            inputs = probe.change(of)
            capture(model, *inputs)
        except AutogateError:
            return False
        finally:
            set_modes(model, modes)
        self._found.append(_Way(of, probe, inputs))
        return True

    def leave(self, checked: Checked) -> None:
        """Leave the inputs which one question was traced for, if the next of its kind takes a third way."""
        if checked.asked is None or self._closed:
            return
        number, probe = checked.asked
        of = self.examples[number]
        for way in self._found:
            if way.of is of and way.probe.what == probe.beyond:
                way.inputs = None
