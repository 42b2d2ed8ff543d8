"""Several traces of one forward, for calls that take different ways through it: which of them a call belongs to.

Each trace has guards. Those that need only the arguments and attributes of modules can be checked before anything runs.
Together with the kinds of the arguments (a tensor, None, a tuple of two tensors) they choose the trace.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from rewriters.forwards.guards import GUARDS, guard, kinds
from rewriters.recording import tensors_of

MOST_CASES = 8
"""A forward that takes more ways than this depends on the example too much to be rewritten."""

NOT_TOLD_APART = "its calls take different paths, which its arguments don't tell apart"
"""Why a forward isn't rewritten whose calls take several ways."""


def chooser(graph: fx.Graph) -> fx.Graph:
    """The part of a traced or rewritten graph that raises where a call's arguments belong to another case."""
    chosen = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in graph.find_nodes(op="placeholder"):
        copies[node] = chosen.node_copy(node)
    expected = kinds(tuple(node.meta["val"] for node in copies))
    of_kinds = chosen.call_function(kinds, (tuple(copies.values()),))
    chosen.call_function(guard, (of_kinds, expected, "the kinds of its arguments"))
    wanted = _needed_early(graph)
    for node in graph.nodes:
        if node in wanted and node.op != "placeholder":
            copies[node] = chosen.node_copy(node, copies.__getitem__)
    chosen.output(True)
    return chosen


def _needed_early(graph: fx.Graph) -> set[fx.Node]:
    """Guards that need nothing that the forward computes with tensors but by cheap ops, and all that these need."""
    early: set[fx.Node] = set()
    for node in graph.nodes:
        computes = node.op == "call_module" or not all(_is_cheap(op) for op in node.meta.get("ops") or ())
        known = node.op != "output" and ("val" in node.meta or node.target in GUARDS) and not computes
        stored = node.op == "get_attr" and bool(tensors_of(node.meta.get("val")))
        if known and not stored and early.issuperset(node.all_input_nodes):
            early.add(node)
    needed: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        if node in early and (node.target in GUARDS or not needed.isdisjoint(node.users)):
            needed.add(node)
    return needed


def _is_cheap(op: torch._ops.OpOverload) -> bool:
    """Whether an op may run once more, to choose a trace by the size of what it returns."""
    return op.is_view or op is torch.ops.aten.constant_pad_nd.default


def told_apart(graphs: Sequence[fx.Graph]) -> bool:
    """Whether each of these graphs refuses the calls that the others were traced for."""
    if not 1 < len(graphs) <= MOST_CASES:
        return len(graphs) < 2
    choosers = [chooser(graph) for graph in graphs]
    given = [[node.meta["val"] for node in graph.find_nodes(op="placeholder")] for graph in graphs]
    return not any(accepts(choosers[one], given[other]) for one, other in itertools.permutations(range(len(graphs)), 2))


def accepts(chosen: fx.Graph, given: Sequence[Any]) -> bool:
    """Whether a chooser lets these arguments pass, with the attributes that modules had when they were traced."""
    values: dict[fx.Node, Any] = dict(zip(chosen.find_nodes(op="placeholder"), given, strict=True))
    try:
        for node in chosen.nodes:
            if node.op == "get_attr":
                values[node] = node.meta["val"]
            elif node.op in ("call_function", "call_method"):
                args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
                call = getattr(args[0], node.target) if node.op == "call_method" else node.target
                values[node] = call(*args[node.op == "call_method" :], **kwargs)
    except Exception:  # what another case takes for granted
        return False
    return True
