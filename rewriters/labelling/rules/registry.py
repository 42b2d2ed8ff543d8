"""The registry of rules: which function says what an op does to labels.

A rule takes an `OpCall` and returns the labels of the result: a `Labelled`, or a list of them for an op with several
results. `@rule("aten.add.Tensor", ...)` registers it. The op need not exist yet: it may be missing in this version of
torch, so one list serves every version, or belong to a library that isn't imported yet.
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
"""Rules of ops that didn't exist when they were registered, by name."""

READS_KEPT = "reads the model's input, or channels that are kept before it"
"""Why a kernel's input side is pinned where no labels reach it."""


@dataclass(frozen=True)
class LabelledStatistic:
    """A statistic across labelled channels, which is exact if it is taken over the live ones only.

    Attributes:
        labels: of the channels that it is taken over, shape (channels,).
        dim: the dimension that they lie along, counted from the last (-1).
        module: path of the module that takes it.
        op: the op that takes it.
        reason: why the channels are pinned if it can't be taken over the live ones.
        by_position: the op is not a statistic but knows channels by their positions (a convolution along them, as in
            efficient channel attention). While gates train, dead channels are zeros to it. The slim model puts the live
            ones back at their positions, which a buffer holds, and picks them out of the result.
        operands: in a traced call, which of the nodes that it takes as inputs have `labels` along `dim`.
    """

    labels: Tensor
    dim: int
    module: str
    op: str
    reason: str
    by_position: bool = False
    operands: tuple[int, ...] = ()


@dataclass(frozen=True)
class Zeroed:
    """Channels whose dead ones add nothing to a kernel's statistic as long as a gate keeps them at zero."""

    labels: Tensor
    module: str
    op: str


@dataclass(frozen=True)
class DeferredMerge:
    """Labels that vary along several dimensions met labels that vary along some of these only.

    Attributes:
        wide: the former: heads x positions in a head, say.
        narrow: the latter, of size 1 along the other dimensions: one for each position.
        module: path of the module in which they met.
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
        kernel: the kernel with the costs of the call.
        rows: labels of the channels that the kernel repeats for, as a layer across tokens does; the costs are those of
            all repeats. None if it repeats for no channels.
    """

    kernel: Kernel
    rows: Tensor | None = None


@dataclass
class Findings:
    """What rules note beside labels.

    Attributes:
        kernels: calls of kernels.
        gated: sides where a gate may stand.
        grids: labels that vary along several dimensions of one tensor.
        statistics: statistics taken across channels.
        live: whether statistics of activations may be taken over the live channels only.
        buffers: names of buffers; no gate can stand on a kernel among them.
        normed: sides along which a kernel is divided by the norm of each of its columns; no gate can stand there.
        zeroed: channels on which a gate has to stand.
        deferred_merges: merges that are decided when all labels have met.
        scattered: to be pinned if the model has other classes at another input size.
        heads: labels of heads, within which activations are multiplied with one another.
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
    normed: set[Side] = field(default_factory=set)
    heads: list[Tensor] = field(default_factory=list)

    def copy(self) -> Findings:
        """A copy, to be continued separately."""
        return Findings(
            list(self.kernels), set(self.gated), list(self.grids), list(self.statistics), self.live, set(self.buffers),
            list(self.zeroed), list(self.deferred_merges), list(self.scattered), set(self.normed),
            list(self.heads),
        )  # fmt: skip

    def apart(self) -> Findings:
        """Empty findings, for ops of the same model whose findings were noted before."""
        return Findings(live=self.live, buffers=self.buffers, deferred_merges=self.deferred_merges, normed=self.normed)


@dataclass(frozen=True)
class OpCall:
    """An op with its arguments, each tensor among them replaced by its `Labelled`.

    Attributes:
        op: the ATen overload.
        args, kwargs: its arguments.
        shapes: shapes of the results.
        module: path of the module that it runs in.
        space: the labels, to merge and to pin.
        findings: where rules note kernels, statistics and more.
        unused: positions of those of several results that nothing is computed from.
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
        """The tensors among the arguments, including those in lists."""
        for value in (*self.args, *self.kwargs.values()):
            for item in value if isinstance(value, (tuple, list)) else (value,):
                if isinstance(item, Labelled):
                    yield item

    def pin(self, labels: Tensor, reason: str) -> None:
        self.space.pin(labels, self.module, str(self.op), reason)

    def mix(self, value: Labelled, dims: Any, reason: str) -> tuple[Tensor, ...]:
        """Layers that survive a mixing of elements along `dims`; they have size 1 there.

        Labels that vary along other dimensions too are merged along `dims`, so that all of what is mixed dies together.
        Labels that vary along `dims` only are pinned.
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
        """As `mix`, for a statistic that can be taken over the live channels, which aren't pinned then.

        Returns:
            Layers that survive the mixing, and those along which the statistic is taken (one or none).
        """
        value = self.without_positions(value)
        if not self.findings.live and value.source is None:
            return self.mix(value, dims, reason), ()
        return self._statistic(value, dims, dims, reason)

    def statistic_by_position(
        self, value: Labelled, dims: Any, reason: str
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """As `statistic`, for an op with an output for each channel along one of `dims`, which it knows by position."""
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
        """A kernel with its positions pinned, so that a computation along its channels needn't pin these."""
        if value.source is None or value.ndim < 3:
            return value
        sides = [self.space.side_of(layer) for layer in value.layers]
        positions = [side is not None and side.dim > 1 for side in sides]
        for layer in compress(value.layers, positions):
            self.pin(layer, "the positions of a kernel")
        rest = [layer for layer, position in zip(value.layers, positions, strict=True) if not position]
        return replace(value, layers=tuple(rest))

    def note_statistic(self, labels: Tensor, dim: int, reason: str, by_position: bool = False) -> None:
        """Note that a statistic is taken across these labels, or that the op knows them by position."""
        self.findings.statistics.append(LabelledStatistic(labels, dim, self.module, str(self.op), reason, by_position))


def overload(name: str) -> Any:
    """The overload with this name ("aten.add.Tensor"), or None if there is none."""
    found: Any = torch.ops
    for part in name.split("."):
        try:
            found = getattr(found, part)
        except AttributeError:
            return None
    return found


def rule(*names: str) -> Callable[[ARule], ARule]:
    """Register a rule for overloads by name ("aten.cat.default"; without the last part, all overloads of the op)."""

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
    """The rule of an op. Ops tagged pointwise share one, and ops without a rule get `unknown`."""
    if op in RULES:
        return RULES[op]
    if torch.Tag.pointwise in getattr(op, "tags", ()):
        RULES[op] = RULES[torch.Tag.pointwise]  # tags are slow to read
        return RULES[op]
    name = str(op)
    return _ABSENT.get(name) or _ABSENT.get(name.rpartition(".")[0]) or unknown


def unknown(call: OpCall) -> Result:
    """Pin all that reaches an op without a rule: the model is slimmed less, never wrongly."""
    for value in call.tensors():
        for layer in value.layers:
            call.pin(layer, "no rule describes this op")
    return [Labelled(shape) for shape in call.shapes]
