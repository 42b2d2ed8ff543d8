"""Find the modules whose own code is right for fewer channels, once some of their attributes are other numbers.

Attention often reads its sizes from attributes: `x.view(n, length, self.heads, -1)`. Then `heads` is set to the number
of heads that are left, and the code stays: it takes every way that it took before, through caches, keyword arguments
and flags. This is asked of forwards that torch.fx can't trace, and of those that get arguments through `**kwargs`.
"""

from __future__ import annotations

import inspect
import itertools
from collections import ChainMap
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy as np
from torch import Tensor, nn
from torch._subclasses import fake_tensor

from rewriters.analysis.capture_modes import Inputs
from rewriters.analysis.trial_rewrites import likeness, trial_masks
from rewriters.errors import AutogateError, TraceError
from rewriters.forwards import LabelMask, TracedForward, code_as_graph, is_right
from rewriters.labelling import ALWAYS, Labelled, Labelling, varying
from rewriters.recording import Capture, FunctionCalls, ModuleCall, all_tensors, capture, set_modes, set_train_mode

_MOST_TRIALS = 32
"""At most as many assignments of sizes to attributes are tried."""

Size = tuple[Labelled, int]
"""What a number is the size of: a tensor's labels, and a dimension."""

Sizes = Mapping[str, Size | None]
"""By attribute: what it is the size of, None if it stays what it is."""


@dataclass(frozen=True)
class OwnCode:
    """A module whose own code stays.

    Attributes:
        path: the module.
        sizes: its attributes.
    """

    path: str
    sizes: Sizes

    def fields(self, mask: LabelMask) -> dict[str, int]:
        """The numbers that attributes have to be, of those that follow slimming."""
        sizes = ((name, size) for name, size in self.sizes.items() if size is not None)
        return {name: int(mask.kept(*size).sum()) for name, size in sizes}


def is_open_ended(module: nn.Module, call: ModuleCall) -> bool:
    """Whether a call gives names to a forward's `**kwargs`: what is passed on there may be more in another call."""
    parameters = inspect.signature(type(module).forward).parameters.values()
    named = {parameter.name for parameter in parameters}
    return any(one.kind is one.VAR_KEYWORD for one in parameters) and not named.issuperset(call.kwargs)


def find_own_code(
    model: nn.Module, recorded: Sequence[Sequence[Capture]], labelling: Labelling, inputs: Sequence[Inputs],
    paths: Set[str],
) -> list[OwnCode]:  # fmt: skip
    """Those of the modules whose own code is right for fewer channels.

    Args:
        model: as it was recorded.
        recorded: for each of the example inputs, in eval mode and maybe in train mode.
        labelling: of these recordings.
        inputs: the example inputs.
        paths: the modules.
    """
    if not paths:
        return []
    codes: dict[str, list[TracedForward]] = {path: [] for path in paths}
    for captures, (args, kwargs) in zip(recorded, inputs, strict=True):
        for training, captured in enumerate(captures):
            found = _recorded_again(model, captured, labelling, args, kwargs, paths, bool(training))
            if found is None:
                return []
            for code in found:
                codes[code.path].append(code)
    class_of = labelling.class_of_label()
    masks = [*trial_masks(labelling, class_of)]
    tried: dict[object, tuple[int, ...] | None] = {}
    own = []
    for path, calls in codes.items():
        if not calls:
            continue
        kind = tuple(likeness(code, class_of) for code in calls)
        sizes = _candidates(calls, class_of)
        if kind not in tried:
            tried[kind] = _chosen(calls, sizes, masks)
        chosen = tried[kind]
        if chosen is not None:
            own.append(OwnCode(path, _at(sizes, chosen)))
    return own


def _recorded_again(
    model: nn.Module, captured: Capture, labelling: Labelling, args: Sequence[Any], kwargs: Mapping[str, Any],
    paths: Set[str], training: bool,
) -> list[TracedForward] | None:  # fmt: skip
    """The modules' own code in each of their calls; None if the model doesn't run as it did before."""
    made = FunctionCalls(paths)
    before = set_modes(model, False)
    try:
        if training:
            set_train_mode(model)
        with mock.patch.object(fake_tensor.log, "disabled", True):  # failing is no error here, so it isn't logged
            again = capture(model, tuple(args), kwargs, captured.opaque, calls=made)
    except AutogateError:
        return None
    finally:
        set_modes(model, before)
    nodes = [*zip(again.graph.nodes, captured.graph.nodes, strict=False)]
    if len(again.graph.nodes) != len(captured.graph.nodes) or any(a.target != b.target for a, b in nodes):
        return None
    known = {id(one.meta["val"]): labelling.values[other] for one, other in nodes if one.op != "output"}
    alive = {id(one.meta["val"]): one.meta["val"] for one, _ in nodes if isinstance(one.meta.get("val"), Tensor)}
    try:
        return [code_as_graph(call.path, calls, known, alive) for call, calls in made.made.items()]
    except TraceError:
        return None


def _candidates(codes: Sequence[TracedForward], class_of: np.ndarray) -> dict[str, list[Size | None]]:
    """For each attribute that the code uses: None, and what it may be the size of."""
    known = ChainMap(*(dict(code.known) for code in codes))
    labelled = {id(t): known[id(t)] for code in codes for t in all_tensors(code.graph) if id(t) in known}
    found: dict[int, dict[bytes, Size]] = {}
    for value in (value for value in labelled.values() if isinstance(value, Labelled)):
        for layer, dim in ((one, dim) for one in value.layers for dim in varying(one)):
            classes = np.sort(class_of[layer.numpy().ravel()])
            if (classes != ALWAYS).any():
                found.setdefault(value.shape[dim], {}).setdefault(classes.tobytes(), (value, dim))
    read = [node for code in codes for node in code.graph.find_nodes(op="get_attr")]
    own = {str(node.target): node.meta["val"] for node in read if "." not in str(node.target)}
    return {name: [None, *found.get(number, {}).values()] for name, number in own.items()}


def _at(sizes: Mapping[str, Sequence[Size | None]], places: Sequence[int]) -> Sizes:
    return {name: options[place] for (name, options), place in zip(sizes.items(), places, strict=True)}


def _chosen(
    codes: Sequence[TracedForward], sizes: Mapping[str, Sequence[Size | None]], masks: Sequence[LabelMask]
) -> tuple[int, ...] | None:
    """The candidates, by their places, with which the code is right for every mask; None if there are none."""
    choices = itertools.product(*(range(len(options)) for options in sizes.values()))
    for places in itertools.islice(choices, _MOST_TRIALS):
        own = OwnCode("", _at(sizes, places))
        if all(is_right(code, mask, own.fields(mask)) for mask in masks for code in codes):
            return places
    return None
