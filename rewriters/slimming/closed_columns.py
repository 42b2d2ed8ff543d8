"""Kernel columns that stay at zero and must not learn.

A layer that loses all of its channels keeps one where its branch can't be removed. That channel is dead: what reads it
has a column of zeros there. In the gated model such a column is zero after every step, so in the slim model it must not
learn either. A kernel without any other column is frozen. One that has others is multiplied by a mask where it is read,
in the rewritten forward of the module that reads it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from rewriters.analysis import Analysis, traces_of
from rewriters.errors import TraceError
from rewriters.forwards import CannotResizeError, Graphs, LabelMask, TracedForward
from rewriters.labelling import ChannelMap, keeps_classes
from rewriters.recording import tensor_slots

Columns = tuple[tuple[int, Tensor], ...]
"""Which columns of a kernel are open: (dimension, bool of the slim kernel's length along it), where some are closed."""


def closed_columns(
    channel_map: ChannelMap, live: Tensor, cuts: Mapping[str, Iterable[tuple[int, Tensor]]], gone: Collection[str]
) -> dict[str, Columns]:
    """The closed columns among those that stay, by the name of the kernel.

    Args:
        channel_map: which channels each class has.
        live: the classes that live, bool, shape (classes,).
        cuts: (dimension, indices that stay) for each tensor that loses indices, by its name.
        gone: names of the tensors that are removed.
    """
    found = {}
    for name, columns in channel_map.open_columns(live).items():
        kept = dict(cuts.get(name, ()))
        left = [(dim, is_open[kept[dim]] if dim in kept else is_open) for dim, is_open in columns]
        closed = tuple((dim, is_open) for dim, is_open in left if not is_open.all())
        if closed and name not in gone:
            found[name] = closed
    return found


def is_starved(columns: Columns) -> bool:
    """Whether a kernel has no open column at all."""
    return any(not is_open.any() for _, is_open in columns)


def partly_closed(model: nn.Module, closed: Mapping[str, Columns]) -> dict[str, Columns]:
    """The kernels that have open columns and closed ones, under each of their names."""
    slots = {name: tensor for name, _, _, tensor in tensor_slots(model)}
    mixed = {id(slots[name]): columns for name, columns in closed.items() if not is_starved(columns)}
    return {name: mixed[id(tensor)] for name, tensor in slots.items() if id(tensor) in mixed}


def readers_of(analysis: Analysis, names: Collection[str]) -> set[str]:
    """Paths of the modules in whose own code these tensors are read."""
    return {
        user.meta["call"].path
        for captured in analysis.captures
        for node in captured.graph.find_nodes(op="get_attr")
        if node.target in names
        for user in node.users
        if user.op == "call_function" and user.meta["call"] is not None
    }


def trace_readers(
    model: nn.Module, analysis: Analysis, paths: Iterable[str], live: Tensor
) -> list[tuple[TracedForward, LabelMask]]:
    """Trace modules that are rewritten for their closed columns alone; with each trace the labels that stay in it.

    A module that can't be rewritten is left out: its columns learn.
    """
    found: list[tuple[TracedForward, LabelMask]] = []
    for path in sorted(paths):
        labelling = analysis.labelling.fork()
        try:
            traced = traces_of(model, analysis, path, labelling)
            mask = LabelMask(labelling.stays(live))
            resized = [one.resize(mask).graph for one in traced]
        except (TraceError, CannotResizeError):
            continue
        alike = len({str(graph) for graph in resized}) == 1
        if alike and keeps_classes(labelling, analysis.labelling):  # else the trace couples channels that are free
            found += [(one, mask) for one in traced]
    return found


def put_masks(graphs: Mapping[str, Graphs], mixed: Mapping[str, Columns], model: nn.Module) -> dict[str, Tensor]:
    """Multiply kernels by masks wherever these graphs read them; returns the masks, which are buffers, by their names.

    Args:
        graphs: rewritten graphs by module path; changed in place.
        mixed: as `partly_closed` returns it.
        model: has the kernels.
    """
    masks: dict[str, Tensor] = {}
    for path, modes in graphs.items():
        for graph in dict.fromkeys(graph for cases in modes.values() for graph in cases):
            for node in graph.find_nodes(op="get_attr"):
                name = f"{path}.{node.target}".lstrip(".")
                if name not in mixed:
                    continue
                with graph.inserting_after(node):
                    mask = graph.create_node("get_attr", f"{node.target}_open")
                with graph.inserting_after(mask):
                    masked = graph.call_function(torch.mul, (node, mask))
                node.replace_all_uses_with(masked, delete_user_cb=lambda user, own=masked: user is not own)
                masks[f"{name}_open"] = _mask(model.get_parameter(name), mixed[name])
    return masks


def _mask(kernel: Tensor, columns: Sequence[tuple[int, Tensor]]) -> Tensor:
    """One for the open columns and zero for the closed ones; of size 1 along the other dimensions."""
    mask = torch.ones([1] * kernel.ndim, dtype=kernel.dtype, device=kernel.device)
    for own, is_open in columns:
        mask = mask * is_open.to(mask).view([-1 if dim == own else 1 for dim in range(kernel.ndim)])
    return mask
