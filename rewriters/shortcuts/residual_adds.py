"""Find identity shortcuts: residual adds one of whose operands comes from an earlier tensor untouched by parameters.

An add is residual where the same tensor reaches it in two ways: through kernels, and through ops that have no
parameter and keep every channel in its place (an activation, pooling, dropout, nothing at all). It is found by
that structure, whatever the modules are called.

He et al., "Deep Residual Learning for Image Recognition", section 3.2.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import fx

from rewriters.labelling import Labelled, Labelling, merge_grids, varying
from rewriters.labelling.rules import Findings, find_rule, movement
from rewriters.recording import Capture, ModuleCall, args_of, is_getitem

ADDS = (torch.ops.aten.add.Tensor, torch.ops.aten.add_.Tensor)
_VIEWS = (movement.expand, movement.move, movement.reorder)


@dataclass(frozen=True, eq=False)
class ResidualAdd:
    """An add with an identity shortcut.

    Attributes:
        node: the recorded add.
        operand: which of its two operands is the shortcut, 0 or 1.
        dim: dimension of the shortcut's channels.
        call: the module call in whose own forward the add stands.
    """

    node: fx.Node
    operand: int
    dim: int
    call: ModuleCall

    @property
    def shortcut(self) -> fx.Node:
        return args_of(self.node)[self.operand]


def residual_adds(captured: Capture, labelling: Labelling) -> list[ResidualAdd]:
    """Residual adds with an identity shortcut, in the order they run.

    Args:
        captured: a recorded forward.
        labelling: labels of its values.
    """
    order = {node: place for place, node in enumerate(captured.graph.nodes)}
    found: list[ResidualAdd] = []
    for node in captured.graph.nodes:
        if node.target in ADDS and node.meta["call"] is not None:
            found.extend(_as_residual(node, labelling, order))
    return found


def _as_residual(node: fx.Node, labelling: Labelling, order: Mapping[fx.Node, int]) -> Iterator[ResidualAdd]:
    shape = node.meta["val"].shape
    operands = args_of(node)[:2]
    if not all(isinstance(one, fx.Node) and one.meta["val"].shape == shape for one in operands):
        return
    for place, shortcut in enumerate(operands):
        dim = _channel_dim(labelling.values[shortcut])
        if node.target is ADDS[1] and place == 0 and _moves(shortcut):
            continue  # written into a view of a tensor that may be read otherwise
        if dim is not None and _reaches(_origin(shortcut, labelling), operands[1 - place], labelling, order):
            yield ResidualAdd(node, place, dim, node.meta["call"])
            return


def _channel_dim(value: Labelled) -> int | None:
    """The one dimension that a value's labels vary along, if it is one that a 1x1 kernel can sum over."""
    dims = {dim for layer in value.layers for dim in varying(layer)}
    if len(dims) != 1 or value.ndim < 2:
        return None
    (dim,) = dims
    return dim if dim == value.ndim - 1 or (dim == 1 and value.ndim <= 5) else None


def _origin(node: fx.Node, labelling: Labelling) -> fx.Node:
    """The value that `node` is but for ops without parameters that leave each channel in its place."""
    while node.op == "call_function" and len(node.all_input_nodes) == 1:
        (source,) = node.all_input_nodes
        if source.op != "call_function" or not _same_channels(labelling.values[source], labelling.values[node]):
            return node
        node = source
    return node


def _moves(node: fx.Node) -> bool:
    """Whether a value may be a view of another one."""
    return is_getitem(node) or (node.op == "call_function" and find_rule(node.target) in _VIEWS)


def _same_channels(before: Labelled | list[Labelled], after: Labelled | list[Labelled]) -> bool:
    """Whether two values carry the same labels in the same order (of several results: the first)."""
    first, second = (value[0] if isinstance(value, list) else value for value in (before, after))
    pairs = list(zip(first.layers, second.layers, strict=False))
    return len(first.layers) == len(second.layers) and all(torch.equal(a.flatten(), b.flatten()) for a, b in pairs)


def _reaches(origin: fx.Node, node: fx.Node, labelling: Labelling, order: Mapping[fx.Node, int]) -> bool:
    """Whether `node` is computed from `origin` with a kernel on the way."""
    first = order[origin]
    seen: set[tuple[fx.Node, bool]] = set()
    open_ends = [(node, False)]
    while open_ends:
        at, through_kernel = open_ends.pop()
        if at is origin:
            if through_kernel:
                return True
            continue
        if order[at] < first or (at, through_kernel) in seen:
            continue
        seen.add((at, through_kernel))
        kernel = through_kernel or bool(labelling.kernels_of(at))
        open_ends.extend((source, kernel) for source in at.all_input_nodes)
    return False


def coupling(
    captured: Capture, adds: list[ResidualAdd], ignore: Mapping[str, str], embed: bool = True
) -> list[ResidualAdd]:
    """Those of the adds that alone couple the channels of their shortcut with those of their other operand.

    The label pass runs once more with a tensor of its own channels in each shortcut's place. Where they come
    out coupled all the same (a depthwise convolution leads from the one to the other), or both sides are
    pinned, a kernel there would free nothing.

    Args:
        captured: the recorded forward that the adds are from.
        ignore: names of parameters and buffers whose channels stay, with the reason.
        embed: whether channels that a norm across channels looks at may die.
    """
    while adds:
        labelling, freed = _label_freed(captured, adds, ignore, embed)
        number = labelling.class_of_label()
        needed = []
        for add, nodes in zip(adds, freed, strict=True):
            shortcut, fresh = (number[_channels(labelling.values[node], add.dim)] for node in nodes)
            if (shortcut != fresh).any():
                needed.append(add)
        if len(needed) == len(adds):
            return adds
        adds = needed
    return []


def _label_freed(
    captured: Capture, adds: list[ResidualAdd], ignore: Mapping[str, str], embed: bool
) -> tuple[Labelling, list[tuple[fx.Node, fx.Node]]]:
    """Labels of the recorded forward with free shortcuts, and each shortcut's node with the one in its place."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    graph.output(graph.graph_copy(captured.graph, copies))
    tensors = dict(captured.tensors)
    freed = []
    for place, add in enumerate(adds):
        name = f"<shortcut {place}>"
        shape = [size if dim == add.dim else 1 for dim, size in enumerate(add.node.meta["val"].shape)]
        tensors[name] = torch.empty(shape, device="meta")
        node = copies[add.node]
        with graph.inserting_before(node):
            fresh = graph.create_node("get_attr", name)
        fresh.meta.update(val=tensors[name], call=None)
        node.update_arg(add.operand, fresh)
        freed.append((copies[add.shortcut], fresh))
    labelling = Labelling(findings=Findings(live=embed))
    labelling.run(replace(captured, graph=graph, tensors=tensors))
    labelling.pin_tensors(ignore, "the caller asked for it")
    merge_grids(labelling)
    return labelling, freed


def _channels(value: Labelled, dim: int) -> np.ndarray:
    """A label for each index along `dim`."""
    layer = value.layer(dim)
    assert layer is not None  # an operand of a residual add, or what stands in for it
    return layer.movedim(dim, 0).flatten(1)[:, 0].numpy()
