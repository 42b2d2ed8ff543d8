"""One function a family of ops says what the op does to labels; this is where it is found.

A rule takes an `OpCall` and returns the labels of the result: a `Labelled`, or a list of them for an op
with several results. `@rule("aten.add.Tensor", ...)` registers it, also for an op that this version of torch
doesn't have, so that one list serves every version, or that a library brings which isn't imported yet.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import compress
from typing import Any, TypeVar

import torch
from torch import Tensor

from rewriters.labelling.channel_map import Kernel, Side
from rewriters.labelling.labels import Labelled, LabelSpace, PinNote, varying

Result = Labelled | list[Labelled]
Rule = Callable[["OpCall"], Result]
ARule = TypeVar("ARule", bound=Rule)

RULES: dict[Any, Rule] = {}

_ABSENT: dict[str, Rule] = {}
"""Rules of ops that weren't there when they were registered, by name."""


@dataclass(frozen=True)
class LabelledStatistic:
    """A statistic along labelled channels: exact for what is left if it is taken over the live ones only.

    Attributes:
        labels: of the channels it is taken over, shape (channels,).
        dim: the dimension they lie along, counted from the last (-1).
        module: path of the module it is taken in.
        op: the op that takes it.
        reason: why they have to stay where it can't be taken over the live ones.
        places: it is no statistic but an op that knows channels by their places (a convolution along them): dead
            ones count as zeros, and the slim model's are put back in their places for it.
    """

    labels: Tensor
    dim: int
    module: str
    op: str
    reason: str
    by_position: bool = False


@dataclass(frozen=True)
class Zeroed:
    """Channels that a statistic of a kernel passes over as long as a gate keeps those that are dead at zero."""

    labels: Tensor
    module: str
    op: str


@dataclass(frozen=True)
class DeferredMerge:
    """Labels that vary along several dimensions and met others that vary along some of these only.

    Attributes:
        wide: the former: heads x places in a head, say.
        narrow: the latter, of size 1 along the other dimensions: one for each place.
        module: path of the module they met in.
        op: the op in which they met.
    """

    wide: Tensor
    narrow: Tensor
    module: str
    op: str


@dataclass(frozen=True)
class KernelCall:
    """A call of a kernel.

    Attributes:
        kernel: with what the call costs.
        rows: labels of the channels that it runs once for each of, as a layer across tokens does; the costs are of
            all of them. None if it runs for no channels.
    """

    kernel: Kernel
    rows: Tensor | None = None


@dataclass
class Findings:
    """What rules note down beside labels: the calls of kernels met, where gates may stand, what was split in two.

    Attributes:
        kernels: calls of kernels.
        gated: sides where a gate may stand.
        grids: labels that vary along several dimensions of one tensor.
        statistics: statistics taken across channels.
        live: whether statistics of activations may be taken over the live channels only.
        buffers: names of buffers; no gate can stand on a kernel among them.
        zeroed: channels on which a gate has to stand.
        deferred_merges: merges that are decided when all labels have met.
        scattered: to be pinned if the model has other classes at another input size.
    """

    kernels: list[KernelCall] = field(default_factory=list)
    gated: set[Side] = field(default_factory=set)
    grids: list[Tensor] = field(default_factory=list)
    statistics: list[LabelledStatistic] = field(default_factory=list)
    live: bool = True
    buffers: set[str] = field(default_factory=set)
    zeroed: list[Zeroed] = field(default_factory=list)
    deferred_merges: list[DeferredMerge] = field(default_factory=list)
    scattered: list[PinNote] = field(default_factory=list)

    def copy(self) -> Findings:
        """The same, to be carried on apart."""
        return Findings(
            list(self.kernels), set(self.gated), list(self.grids), list(self.statistics), self.live, set(self.buffers),
            list(self.zeroed), list(self.deferred_merges), list(self.scattered),
        )  # fmt: skip

    def apart(self) -> Findings:
        """None yet, for ops of the same model that were met before."""
        return Findings(live=self.live, buffers=self.buffers, deferred_merges=self.deferred_merges)


@dataclass(frozen=True)
class OpCall:
    """An op with its arguments, each tensor among them replaced by its `Labelled`.

    Attributes:
        op: the ATen overload.
        args, kwargs: the arguments.
        shapes: shapes of the results.
        module: path of the module it runs in.
        space: labels, to merge and to pin.
        findings: where kernels are noted.
        unused: places of those of several results that nothing is computed from.
    """

    op: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    shapes: list[tuple[int, ...]]
    module: str
    space: LabelSpace
    findings: Findings
    unused: frozenset[int] = frozenset()

    def arg(self, index: int, name: str, default: Any = None) -> Any:
        """An argument by position or by name."""
        return self.args[index] if len(self.args) > index else self.kwargs.get(name, default)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.shapes[0]

    def tensors(self) -> Iterator[Labelled]:
        """The tensors among the arguments, also those in lists."""
        for value in (*self.args, *self.kwargs.values()):
            for item in value if isinstance(value, (tuple, list)) else (value,):
                if isinstance(item, Labelled):
                    yield item

    def pin(self, labels: Tensor, reason: str) -> None:
        self.space.pin(labels, self.module, str(self.op), reason)

    def mix(self, value: Labelled, dims: Any, reason: str) -> tuple[Tensor, ...]:
        """Layers that outlive a mixing of elements along `dims`; they are of size 1 there.

        Labels that vary along other dimensions too are merged along these: what dies, dies with the
        whole of what is mixed. Labels that vary along nothing else are pinned.
        """
        dims = {dim % value.ndim for dim in dims} if value.ndim else set()
        survivors = []
        for layer in value.layers:
            if not dims & set(varying(layer)):
                survivors.append(layer)
            elif set(varying(layer)) - dims:
                survivors.append(self.space.merge_along(layer, dims))
            else:
                self.pin(layer, reason)
        return tuple(survivors)

    def statistic(self, value: Labelled, dims: Any, reason: str) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """As `mix`, for a statistic that can be taken over live channels only: these needn't stay.

        Returns:
            Layers that outlive the mixing, and those along which the statistic is taken (one or none).
        """
        value = self.without_positions(value)
        if not self.findings.live and value.source is None:
            return self.mix(value, dims, reason), ()
        return self._statistic(value, dims, dims, reason)

    def statistic_by_position(
        self, value: Labelled, dims: Any, reason: str
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """As `look`, for an op that gives a channel for each along one of `dims` and knows them by their places."""
        lasting = [dim for dim in dims if value.shape[dim] == self.shape[dim] and value.source is None]
        return self._statistic(value, lasting, dims, reason, by_position=True)

    def _statistic(
        self, value: Labelled, seen: Any, mixed: Any, reason: str, by_position: bool = False
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Take a statistic along the one dimension among `seen` that labels vary in alone; mix along all of `mixed`."""
        dims = {dim % value.ndim for dim in seen} if value.ndim else set()
        along = tuple(layer for layer in value.layers if varying(layer) and set(varying(layer)) <= dims)
        if len(along) != 1 or len(varying(along[0])) != 1:
            return self.mix(value, mixed, reason), ()
        (dim,) = varying(along[0])
        self.note_statistic(along[0].flatten(), dim - value.ndim, reason, by_position)
        rest = tuple(layer for layer in value.layers if layer is not along[0])
        return self.mix(Labelled(value.shape, rest), mixed, reason), along

    def without_positions(self, value: Labelled) -> Labelled:
        """A kernel whose positions stay: computed with along its channels, these needn't stay for them."""
        if value.source is None or value.ndim < 3:
            return value
        sides = [self.space.side_of(layer) for layer in value.layers]
        positions = [side is not None and side.dim > 1 for side in sides]
        for layer in compress(value.layers, positions):
            self.pin(layer, "the positions of a kernel")
        rest = [layer for layer, position in zip(value.layers, positions, strict=True) if not position]
        return replace(value, layers=tuple(rest))

    def note_statistic(self, labels: Tensor, dim: int, reason: str, by_position: bool = False) -> None:
        """Note that a statistic is taken along these labels, or that the op knows them by their places."""
        self.findings.statistics.append(LabelledStatistic(labels, dim, self.module, str(self.op), reason, by_position))


def overload(name: str) -> Any:
    """The overload called e.g. "aten.add.Tensor", or None where there is none."""
    found: Any = torch.ops
    for part in name.split("."):
        try:
            found = getattr(found, part)
        except AttributeError:
            return None
    return found


def rule(*names: str) -> Callable[[ARule], ARule]:
    """Register a rule for the named overloads ("aten.cat.default"; without the last part, all of an op's)."""

    def register(function: ARule) -> ARule:
        for name in names:
            found = overload(name)
            if found is None:
                _ABSENT[name] = function
                continue
            overloads = [found] if name.count(".") == 2 else [getattr(found, o) for o in found.overloads()]
            for each in overloads:
                RULES[each] = function
        return function

    return register


def find_rule(op: Any) -> Rule:
    """The rule registered for an op; elementwise ops share one, ops nobody has described another."""
    if op in RULES:
        return RULES[op]
    if torch.Tag.pointwise in getattr(op, "tags", ()):
        return RULES[torch.Tag.pointwise]
    name = str(op)
    return _ABSENT.get(name) or _ABSENT.get(name.rpartition(".")[0]) or unknown


def unknown(call: OpCall) -> Result:
    """An op nobody has described keeps all that reaches it: slimmed less, never wrongly."""
    for value in call.tensors():
        for layer in value.layers:
            call.pin(layer, "no rule describes this op")
    return [Labelled(shape) for shape in call.shapes]
