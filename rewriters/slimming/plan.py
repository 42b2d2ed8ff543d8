"""Plan how to remove dead channels from a model, and apply the plan: slice tensors, update fields, rewrite forwards.

Slim tensors are new parameters, because PyTorch's optimizers and autograd depend on a parameter's shape.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Set
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from rewriters.analysis import Analysis
from rewriters.cross_channel import remove_live_statistics
from rewriters.errors import SurgeryError
from rewriters.forwards import (
    Graphs,
    InterpretedForward,
    LabelMask,
    RewrittenForward,
    TracedForward,
    disable_fused_layers,
    set_forward,
    told_apart,
)
from rewriters.labelling import ChannelMap, Kernel, Side
from rewriters.recording import drop_caches, modules_of, tensor_slots, without_caches
from rewriters.slimming.closed_columns import (
    Columns,
    closed_columns,
    is_starved,
    partly_closed,
    put_masks,
    readers_of,
    trace_readers,
)
from rewriters.slimming.dead_branches import Pruned, is_under, prune_branches
from rewriters.slimming.decisions import Decisions
from rewriters.slimming.fusable_blocks import fields_in_fusable_blocks, update_fusable_blocks
from rewriters.slimming.module_fields import fields_after, owner_of, refresh_flat_weights, widths_of_bare_norms
from rewriters.slimming.removed import CONTAINERS, Removed
from rewriters.slimming.tensors import like, take_indices, unfilled
from rewriters.undo_log import UndoLog


@dataclass(frozen=True)
class SlimPlan:
    """What slimming will do to a model.

    Attributes:
        live: classes that stay, bool of shape (classes,).
        kept: for each side that loses indices, those that stay (int64).
        forwards: rewritten forwards by module path.
        constants: buffers that rewritten forwards read, by qualified name: constants that replace dead branches, and
            the positions that channels had.
        removed: paths of the modules that nothing calls any more.
        kernels: the kernels that are left.
        restored: modules that get back the forward that they had before an earlier rewriting: that forward, or None for
            their class's own.
        decisions: what was read from the weights.
        fields: numbers of the channels that are left, in attributes of modules, by path and name.
        dead: those of the classes that stay that are dead, bool of shape (classes,): a layer needs a channel.
        closed: the columns of these classes, which must not learn, by the name of each kernel that has some.
        masked: modules whose forward is rewritten for nothing but such columns.
    """

    live: Tensor
    kept: Mapping[Side, Tensor]
    forwards: Mapping[str, Graphs]
    constants: Mapping[str, Tensor]
    removed: frozenset[str]
    kernels: tuple[Kernel, ...]
    restored: Mapping[str, RewrittenForward | None] = field(default_factory=dict)
    decisions: Decisions = field(default_factory=Decisions)
    fields: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    dead: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.bool))
    closed: Mapping[str, Columns] = field(default_factory=dict)
    masked: frozenset[str] = frozenset()

    def flops(self, channel_map: ChannelMap) -> float:
        """Multiply-adds of what is left, for one sample."""
        return sum(channel_map.macs(kernel, self.live) for kernel in self.kernels)

    def cuts(self) -> dict[str, list[tuple[int, Tensor]]]:
        """For each tensor that loses indices: (dimension, indices that stay), by its qualified name."""
        return _by_tensor(self.kept)


def _by_tensor(kept: Mapping[Side, Tensor]) -> dict[str, list[tuple[int, Tensor]]]:
    cuts: dict[str, list[tuple[int, Tensor]]] = {}
    for side, indices in kept.items():
        cuts.setdefault(side.tensor, []).append((side.dim, indices))
    return cuts


def plan(
    model: nn.Module,
    analysis: Analysis,
    live: Tensor,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    decided: Decisions | None = None,
    rewritten: Collection[str] = (),
) -> SlimPlan:
    """Plan the slimming to the classes in `live` (bool, shape (classes,)).

    Args:
        model: as it was analysed, with the kernels of dead classes at zero.
        analysis: of that model.
        live: which classes stay.
        args: example inputs by position; the model runs on them if a dead branch leaves a constant.
        kwargs: example inputs by name.
        decided: what an earlier plan for the same classes read from the weights. Then nothing runs, no weight is read,
            and constants are zero.
        rewritten: modules whose forward is written again even if this pattern leaves its code as it is.

    Raises:
        SurgeryError: a forward cannot be rewritten for this pattern.
    """
    channel_map, wanted = analysis.channel_map, live.cpu()
    live = channel_map.looked_at(wanted)
    while True:
        with without_caches(model):
            pruned = prune_branches(
                model, analysis, live, wanted, args, kwargs or {}, decided.branches if decided is not None else None
            )
        removed = frozenset[str]().union(*(one.removed for one in pruned))
        gone = _tensors_under(model, removed) | _computed_under(channel_map, removed)
        survivors = channel_map.survivors(live, gone)
        if torch.equal(survivors, live):
            break
        live = survivors  # with one more channel, a branch may be alive
    kept = {side: indices for side, indices in channel_map.cuts(live).items() if side.tensor not in gone}
    kernels = tuple(kernel for kernel in channel_map.kernels if kernel.weight not in gone)
    mask = analysis.label_mask(live)
    closed = closed_columns(channel_map, wanted, _by_tensor(kept), gone)
    forwards, constants, masked = _rewrite(model, analysis, mask, pruned, closed, live, rewritten)
    fields = widths_of_bare_norms(model, analysis, mask) | {
        one.path: one.fields(mask) for one in analysis.own_code if one.path not in forwards
    }
    decisions = Decisions(branches={one.path: one.uniform for one in pruned})
    return SlimPlan(
        live, kept, forwards, constants, removed, kernels, decisions=decisions, fields=fields,
        dead=live & ~wanted, closed=closed, masked=masked,
    )  # fmt: skip


def _tensors_under(model: nn.Module, paths: Set[str]) -> set[str]:
    """Tensors that are in these modules only."""
    if not paths:
        return set()
    inside: dict[int, bool] = {}
    for name, _, _, tensor in tensor_slots(model):
        under = is_under(name, paths)
        inside[id(tensor)] = under and inside.get(id(tensor), True)
    return {name for name, _, _, tensor in tensor_slots(model) if inside[id(tensor)]}


def _computed_under(channel_map: ChannelMap, paths: Set[str]) -> set[str]:
    """Names of the computed kernels of these modules."""
    return {kernel.weight for kernel in channel_map.kernels if kernel.computed and is_under(kernel.module, paths)}


def _rewrite(
    model: nn.Module, analysis: Analysis, mask: LabelMask, pruned: list[Pruned], closed: Mapping[str, Columns],
    live: Tensor, also: Collection[str],
) -> tuple[dict[str, Graphs], dict[str, Tensor], frozenset[str]]:  # fmt: skip
    """Rewritten forwards of the modules whose code has to change for this pattern, and the buffers that they read; and
    those of the modules that are rewritten for closed columns alone."""
    done: dict[str, Graphs] = {one.path: one.graphs for one in pruned}
    gone = {path for one in pruned for path in one.removed}
    mixed = partly_closed(model, closed)
    readers = {path for path in readers_of(analysis, mixed) if path not in done and not is_under(path, gone)}
    traced = [(one, mask) for one in analysis.traced if one.path not in done and not is_under(one.path, gone)]
    for_columns = trace_readers(model, analysis, readers - {one.path for one, _ in traced}, live)
    graphs, taken = resized_forwards([*traced, *for_columns], readers | set(also))
    taken += [(one.path, one.constants) for one in pruned]
    constants = {f"{path}.{name}".lstrip("."): value for path, own in taken for name, value in own.items()}
    constants |= put_masks(done | graphs, mixed, model)
    return done | graphs, constants, frozenset(one.path for one, _ in for_columns)


def resized_forwards(
    traced_forwards: Iterable[tuple[TracedForward, LabelMask]], rewritten: Set[str]
) -> tuple[dict[str, Graphs], list[tuple[str, Mapping[str, Tensor]]]]:
    """Traced forwards for fewer channels, if slimming changes them or they are among those `rewritten` in any case.

    Calls that took the same way through a module's forward have the same code there; others are cases of their own.

    Returns:
        The graphs by path, and for each trace its path and the buffers that it reads.
    """
    taken: list[tuple[str, Mapping[str, Tensor]]] = []
    found: dict[str, dict[bool, dict[str, fx.Graph]]] = {}
    changed: set[str] = set()
    differing: set[str] = set()
    for traced, mask in traced_forwards:
        resizer = traced.resize(mask)
        changed |= {traced.path} if resizer.changed or traced.path in rewritten else set()
        taken.append((traced.path, resizer.constants))
        for mode in traced.modes:
            ways = found.setdefault(traced.path, {}).setdefault(mode, {})
            first = ways.setdefault(traced.code, resizer.graph)
            differing |= {traced.path} if first is not resizer.graph and _code(first) != _code(resizer.graph) else set()
    graphs: dict[str, Graphs] = {
        path: {mode: _distinct(ways) for mode, ways in found[path].items()} for path in sorted(changed)
    }
    for path, modes in graphs.items():
        if path in differing or not all(map(told_apart, modes.values())):
            raise SurgeryError("its calls take different paths, which would need different code", where=path)
    return graphs, taken


def _distinct(ways: Mapping[str, fx.Graph]) -> tuple[fx.Graph, ...]:
    graphs = tuple(ways.values())
    return graphs if len(graphs) == 1 else tuple({_code(graph): graph for graph in graphs}.values())


def _code(graph: fx.Graph) -> str:
    return graph.python_code("self").src


def apply(
    model: nn.Module, slim_plan: SlimPlan, undo_log: UndoLog, with_values: bool = True, compiled: bool = True
) -> None:
    """Carry out a plan on the live model. Statistics across channels are the plain ones again.

    Caches that forwards filled in earlier calls are dropped, because they have the old sizes.

    Args:
        model: changed in place: tensors, module fields with sizes, forwards, removed modules.
        slim_plan: made for this model.
        undo_log: notes every change, so that it can be undone.
        with_values: whether sliced tensors keep the values that are left. If not, they are uninitialised, for a model
            that runs without data and is then restored.
    """
    remove_live_statistics(model, undo_log)
    drop_caches(modules_of(model), undo_log)
    widths = fields_in_fusable_blocks(model)
    sliced: dict[int, Tensor] = {}  # a shared tensor stays shared
    first_name = {name: tensor for name, _, _, tensor in reversed(list(tensor_slots(model)))}
    cuts = slim_plan.cuts()
    for name in dict.fromkeys([*cuts, *slim_plan.closed]):
        tensor, dims = first_name[name], cuts.get(name, [])
        taken = take_indices(tensor.detach(), dims) if with_values else unfilled(tensor, dims)
        sliced[id(tensor)] = like(tensor, taken, learns=not is_starved(slim_plan.closed.get(name, ())))
    grouped = {kernel.weight for kernel in slim_plan.kernels if not kernel.mixes}
    for name, module, own_name, tensor in list(tensor_slots(model)):
        if id(tensor) in sliced:
            owner, its_name = owner_of(model, name, module, own_name)
            undo_log.set_tensor(module, own_name, sliced[id(tensor)])
            for field, value in fields_after(owner, its_name, tensor.shape, sliced[id(tensor)].shape, name in grouped):
                undo_log.set_attribute(owner, field, value)
    refresh_flat_weights(model, undo_log)
    if slim_plan.kept:
        disable_fused_layers(model, undo_log)
    for path, graphs in slim_plan.forwards.items():
        module = model.get_submodule(path)
        kind = RewrittenForward if compiled else InterpretedForward
        set_forward(module, kind(module, graphs, path), undo_log)
    for path, forward in slim_plan.restored.items():
        set_forward(model.get_submodule(path), forward, undo_log)
    for name, value in slim_plan.constants.items():
        path, _, own_name = name.rpartition(".")
        undo_log.set_tensor(model.get_submodule(path), own_name, value)
    for path, numbers in slim_plan.fields.items():
        for name, number in numbers.items():
            undo_log.set_attribute(model.get_submodule(path), name, number)
    for path in slim_plan.removed:
        parent, _, own_name = path.rpartition(".")
        holder = model.get_submodule(parent)
        if isinstance(holder, CONTAINERS):
            undo_log.set(holder._modules, own_name, Removed(path))
        else:
            undo_log.remove(holder._modules, own_name)
    update_fusable_blocks(model, widths, undo_log)
