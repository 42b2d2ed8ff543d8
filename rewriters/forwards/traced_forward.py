"""A module's own forward, traced with torch.fx in eval and train mode.

A forward that doesn't ask for its mode while it is traced is traced once, for both modes.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import fx, nn

from rewriters.errors import TraceError
from rewriters.forwards.attribute_reads import AskedMode
from rewriters.forwards.label_mask import LabelMask
from rewriters.forwards.resizing import Resizer
from rewriters.forwards.rewritten_forward import stands_in
from rewriters.forwards.tracing import trace
from rewriters.labelling import Labelled, Labelling
from rewriters.recording import Capture, ModuleCall, set_modes


@dataclass(frozen=True, eq=False)
class TracedForward:
    """A module's own forward, traced for one of its calls.

    Attributes:
        path: the module.
        modes: the modes that the trace is valid for: eval (False), train (True), or both.
        graph: the traced graph.
        known: labels of the tensors in it, by id.
        stands_in: an equivalent that is written out was traced, because the module's own forward, or a call in it,
            can't be.
    """

    path: str
    modes: tuple[bool, ...]
    graph: fx.Graph
    known: Mapping[int, Labelled]
    stands_in: bool = False

    @functools.cached_property
    def code(self) -> str:
        """The graph as text, equal for calls that take the same way through the forward."""
        return str(self.graph)

    def resize(self, mask: LabelMask) -> Resizer:
        """The forward rewritten for a label mask. Raises `CannotResizeError`."""
        resizer = Resizer(self.graph, self.known, mask, self.path)
        resizer.run()
        resizer.changed |= self.stands_in and resizer.cuts()
        return resizer


def graphs_by_mode(
    traced: Iterable[TracedForward], graph: Callable[[TracedForward], fx.Graph]
) -> dict[bool, tuple[fx.Graph, ...]]:
    """The graph of one call for eval mode (False) and train mode (True): the same if it doesn't ask for its mode."""
    return {mode: (made,) for one in traced for made in [graph(one)] for mode in one.modes}


def trace_modes(
    module: nn.Module, call: ModuleCall, captured: Capture, labelling: Labelling, known: Mapping[int, Labelled],
    only: bool | None = None,
) -> list[TracedForward]:  # fmt: skip
    """Trace a module's forward: in both modes if it asks for its mode, else once. Raises `TraceError`.

    Args:
        module: the module.
        call: a recorded call of it.
        captured: the recording that the call is in.
        labelling: labels of all that was recorded.
        known: labels of the tensors in it, by id.
        only: the mode to trace in, if the call was recorded in that mode and another one in the other.
    """

    def traced(modes: tuple[bool, ...], training: Any) -> TracedForward:
        set_modes(module, modes[-1] and len(modes) == 1)  # its children too, whose mode it may ask for
        module.training = training
        graph, labels, wrote_out = trace(module, call, captured, labelling, known)
        return TracedForward(call.path, modes, graph, labels, wrote_out or stands_in(module))

    before = set_modes(module, False)
    mode = AskedMode()
    try:
        if only is not None:
            return [traced((only,), only)]
        with contextlib.suppress(TraceError):  # it may need its mode to be a real bool
            first = traced((False, True), mode)
            return [first] if not mode.asked else [replace(first, modes=(False,)), traced((True,), True)]
        return [traced((False,), False), traced((True,), True)]
    finally:
        set_modes(module, before)
