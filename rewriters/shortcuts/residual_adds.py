"""Find residual adds with an identity shortcut.

An add is residual if the same tensor reaches it in two ways: through kernels, and through ops that have no parameters
and keep every channel at its index (an activation, pooling, dropout, nothing at all). Adds are found by this structure
in the captured graph, not by the names of modules.

Which of them need a kernel on the shortcut is asked of the labels: the label pass runs again with a tensor of its own
channels on each shortcut. If shortcut and sum come out in one class anyway (a depthwise convolution couples them too),
or both pinned, a kernel would gain nothing.

He et al., "Deep Residual Learning for Image Recognition", section 3.2.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
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
        call: the module call whose own forward makes the add.
    """

    node: fx.Node
    operand: int
    dim: int
    call: ModuleCall

    @property
    def shortcut(self) -> fx.Node:
        return args_of(self.node)[self.operand]


def residual_adds(captured: Capture, labelling: Labelling) -> list[ResidualAdd]:
    """Residual adds with an identity shortcut, in the order in which they run.

    Args:
        captured: a captured forward.
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
            continue  # it writes into a view of a tensor that may be read elsewhere
        if dim is not None and _reaches(_origin(shortcut, labelling), operands[1 - place], labelling, order):
            yield ResidualAdd(node, place, dim, node.meta["call"])
            return


def _channel_dim(value: Labelled) -> int | None:
    """The one dimension along which a value's labels vary, if a 1x1 kernel can sum over it."""
    dims = {dim for layer in value.layers for dim in varying(layer)}
    if len(dims) != 1 or value.ndim < 2:
        return None
    (dim,) = dims
    return dim if dim == value.ndim - 1 or (dim == 1 and value.ndim <= 5) else None


def _origin(node: fx.Node, labelling: Labelling) -> fx.Node:
    """The value that `node` comes from through ops without parameters that leave each channel at its index."""
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
    """Whether two values carry the same labels in the same order (the first of several results counts)."""
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
    captures: Sequence[Capture], shortcuts: list[Sequence[ResidualAdd]], ignore: Mapping[str, str], embed: bool = True
) -> list[Sequence[ResidualAdd]]:
    """Those of the shortcuts that are the only coupling between their channels and those of the other operand.

    The label pass runs again with a tensor of its own channels on each shortcut. If they come out coupled anyway (a
    depthwise convolution leads from one to the other), or if both sides are pinned, a kernel there would free nothing.

    Args:
        captures: the captured forwards of the adds, one for each of the example inputs.
        shortcuts: the shortcuts to choose from, each as its adds: one in each of the captures that run it.
        ignore: names of parameters and buffers whose channels stay, with the reason.
        embed: whether channels that norms across channels include can be removed.
    """
    while shortcuts:
        labelling, freed = _label_freed(captures, shortcuts, ignore, embed)
        class_of = labelling.class_of_label()
        needed = []
        for adds, nodes in zip(shortcuts, freed, strict=True):
            if all(_differ(class_of, labelling, add.dim, *pair) for add, pair in zip(adds, nodes, strict=True)):
                needed.append(adds)
        if len(needed) == len(shortcuts):
            return shortcuts
        shortcuts = needed
    return []


def _differ(class_of: np.ndarray, labelling: Labelling, dim: int, shortcut: fx.Node, fresh: fx.Node) -> bool:
    """Whether any channel of two values is of another class."""
    first, second = (class_of[_channels(labelling.values[node], dim)] for node in (shortcut, fresh))
    return bool((first != second).any())


def _label_freed(
    captures: Sequence[Capture], shortcuts: Sequence[Sequence[ResidualAdd]], ignore: Mapping[str, str], embed: bool
) -> tuple[Labelling, list[list[tuple[fx.Node, fx.Node]]]]:
    """Labels of the captured forwards with free shortcuts; for each shortcut's adds its node and what replaces it."""
    labelling = Labelling(findings=Findings(live=embed))
    freed: dict[ResidualAdd, tuple[fx.Node, fx.Node]] = {}
    for captured in captures:
        graph = fx.Graph()
        copies: dict[fx.Node, fx.Node] = {}
        graph.output(graph.graph_copy(captured.graph, copies))
        tensors = dict(captured.tensors)
        for place, adds in enumerate(shortcuts):
            for add in (add for add in adds if add.node.graph is captured.graph):
                name = f"<shortcut {place}>"
                shape = [size if dim == add.dim else 1 for dim, size in enumerate(add.node.meta["val"].shape)]
                tensors[name] = torch.empty(shape, device="meta")
                node = copies[add.node]
                with graph.inserting_before(node):
                    fresh = graph.create_node("get_attr", name)
                fresh.meta.update(val=tensors[name], call=None)
                node.update_arg(add.operand, fresh)
                freed[add] = copies[add.shortcut], fresh
        labelling.run(replace(captured, graph=graph, tensors=tensors))
    labelling.pin_tensors(ignore, "the caller asked for it")
    merge_grids(labelling)
    return labelling, [[freed[add] for add in adds] for adds in shortcuts]


def _channels(value: Labelled, dim: int) -> np.ndarray:
    """A label for each index along `dim`."""
    layer = value.layer(dim)
    assert layer is not None  # an operand of a residual add, or its replacement
    return layer.movedim(dim, 0).flatten(1)[:, 0].numpy()
