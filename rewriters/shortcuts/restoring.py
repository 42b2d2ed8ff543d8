"""Restore identity shortcuts if their 1x1 convolutions only pass channels on.

Each kernel is judged on the channels that stay. An identity is removed; if nothing else in its module was rewritten,
the module's own forward is restored. A kernel that selects channels, or leaves some at zero, becomes an index. Any
other kernel stays a convolution.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from rewriters.analysis import Analysis, traces_of
from rewriters.errors import SurgeryError, TraceError
from rewriters.forwards import CannotResizeError, Graphs, LabelMask
from rewriters.labelling import Side, keeps_classes
from rewriters.shortcuts.replacing import Shortcut
from rewriters.slimming import Decisions, SlimPlan, resized_forwards


@dataclass(frozen=True, eq=False)
class _Selection:
    """A slimmed 1x1 kernel that only passes channels on.

    Attributes:
        shortcut: the convolution.
        sources: for each output the input that it equals, int64 of shape (outputs,); `inputs` if it is zero.
        inputs: number of inputs.
        pad: the widths with which `F.pad` appends a channel of zeros to the convolution's input.
    """

    shortcut: Shortcut
    sources: Tensor
    inputs: int
    pad: tuple[int, ...]

    @property
    def is_identity(self) -> bool:
        return torch.equal(self.sources.cpu(), torch.arange(self.inputs))

    @property
    def index_name(self) -> str:
        return f"{self.shortcut.name}_index"

    def put_into(self, graph: fx.Graph) -> None:
        """Select channels in a forward instead of calling the convolution."""
        calls = [node for node in graph.nodes if node.op == "call_module" and node.target == self.shortcut.name]
        for call in calls:
            with graph.inserting_before(call):
                selected = call.args[0] if self.is_identity else self._select(graph, call.args[0])
            call.replace_all_uses_with(selected)
            graph.erase_node(call)

    def _select(self, graph: fx.Graph, value: fx.Node) -> fx.Node:
        if self.inputs in self.sources:
            value = graph.call_function(F.pad, (value, self.pad))
        index = graph.create_node("get_attr", self.index_name)
        return graph.call_function(torch.index_select, (value, -len(self.pad) // 2, index))


def restore(
    model: nn.Module, analysis: Analysis, slim_plan: SlimPlan, shortcuts: Iterable[Shortcut],
    decided: Decisions | None = None,
) -> SlimPlan:  # fmt: skip
    """The plan without those of the convolutions that are the identity on the channels that stay.

    A kernel that only selects channels, or leaves some at zero, becomes a selection. If all shortcuts of a module are
    identities again and it needs no other rewriting, its former forward is restored.

    Args:
        model: as it was analysed, not slimmed yet.
        analysis: of that model.
        slim_plan: the result of `plan` for them.
        shortcuts: the convolutions that `replace_shortcuts` added.
        decided: what an earlier plan for the same classes found of their kernels, which aren't read then.
    """
    by_module: dict[str, list[Shortcut]] = {}
    for shortcut in shortcuts:
        by_module.setdefault(shortcut.module, []).append(shortcut)
    left = {kernel.weight for kernel in slim_plan.kernels}
    for path, own in by_module.items():
        found = [_selection(model, slim_plan, one, decided) for one in own if one.weight in left]
        selections = [one for one in found if one is not None]
        if not selections:
            continue
        if path not in slim_plan.forwards and sum(one.is_identity for one in selections) == len(own):
            slim_plan = replace(slim_plan, restored={**slim_plan.restored, path: own[0].before})
        else:
            graphs = slim_plan.forwards.get(path) or _forwards(model, analysis, slim_plan, path)
            if graphs is None:
                continue
            slim_plan = _with_selections(slim_plan, path, graphs, selections)
        slim_plan = _without(slim_plan, selections)
    return slim_plan


def _selection(
    model: nn.Module, slim_plan: SlimPlan, shortcut: Shortcut, decided: Decisions | None
) -> _Selection | None:
    """The selection that a convolution is on the channels that stay; None if it computes something else."""
    weight = model.get_parameter(shortcut.weight).detach()
    kernel = weight.flatten(1)
    for dim in (0, 1):
        kept = slim_plan.kept.get(Side(shortcut.weight, dim))
        if kept is not None:
            kernel = kernel.index_select(dim, kept.to(kernel.device))
    inputs = kernel.shape[1]
    if decided is not None:
        sources = _as_decided(decided, shortcut, kernel)
        if sources is None:
            return None
    else:
        taken = kernel != 0
        if ((kernel != 1) & taken).any() or (taken.sum(1) > 1).any():
            return None
        sources = torch.where(taken.any(1), taken.to(torch.int8).argmax(1), inputs)
    return _Selection(shortcut, sources, inputs, (0, 0) * (weight.ndim - 2) + (0, 1))


def _as_decided(decided: Decisions, shortcut: Shortcut, kernel: Tensor) -> Tensor | None:
    """The selection that was noted for a slimmed kernel; None if it was found to compute something else."""
    if shortcut.path not in decided.selections:
        return None
    sources = torch.tensor(decided.selections[shortcut.path], dtype=torch.int64, device=kernel.device)
    outputs, inputs = kernel.shape
    if len(sources) != outputs or not ((sources >= 0) & (sources <= inputs)).all():
        raise SurgeryError(
            f"the noted selection has {len(sources)} outputs; the kernel has {outputs} outputs and {inputs} inputs.",
            where=shortcut.path,
        )
    return sources


def _forwards(model: nn.Module, analysis: Analysis, slim_plan: SlimPlan, path: str) -> Graphs | None:
    """A module's forwards for the plan's live classes; None if they can't be rewritten."""
    labelling = analysis.labelling.fork()
    try:
        traced = traces_of(model, analysis, path, labelling)
        if not keeps_classes(labelling, analysis.labelling):
            return None  # the trace couples channels that are free in the captured model
        mask = LabelMask(labelling.stays(slim_plan.live))  # the trace may have labels of its own
        graphs, _ = resized_forwards([(one, mask) for one in traced], {path})
        return graphs[path]
    except (TraceError, CannotResizeError, SurgeryError):
        return None


def _with_selections(slim_plan: SlimPlan, path: str, graphs: Graphs, selections: list[_Selection]) -> SlimPlan:
    for one in selections:
        for graph in dict.fromkeys(itertools.chain(*graphs.values())):
            one.put_into(graph)
    indices = {f"{path}.{one.index_name}".lstrip("."): one.sources for one in selections if not one.is_identity}
    return replace(
        slim_plan,
        forwards={**slim_plan.forwards, path: graphs},
        constants={**slim_plan.constants, **indices},
    )


def _without(slim_plan: SlimPlan, selections: Collection[_Selection]) -> SlimPlan:
    """The plan without these convolutions."""
    gone = {one.shortcut.path for one in selections}

    def stays(name: str) -> bool:
        return name not in gone and name.rpartition(".")[0] not in gone

    sources = {one.shortcut.path: tuple(one.sources.tolist()) for one in selections}
    noted = slim_plan.decisions
    return replace(
        slim_plan,
        decisions=replace(noted, selections={**noted.selections, **sources}),
        removed=slim_plan.removed | gone,
        kept={side: kept for side, kept in slim_plan.kept.items() if stays(side.tensor)},
        kernels=tuple(kernel for kernel in slim_plan.kernels if stays(kernel.weight)),
        closed={name: columns for name, columns in slim_plan.closed.items() if stays(name)},
        masked=frozenset(filter(stays, slim_plan.masked)),
        forwards={path: graphs for path, graphs in slim_plan.forwards.items() if stays(path)},
        constants={name: value for name, value in slim_plan.constants.items() if stays(name)},
    )
