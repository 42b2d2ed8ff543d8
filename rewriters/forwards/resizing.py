"""Rewrite a traced forward for the channels that are left.

Every call whose arguments or results lose channels is run on meta tensors of the slimmed shapes. If the call as it is
gives the slimmed result, it stays. If not, `sizes.py` writes its sizes again, and the new call is run. Calls that only
move data are checked index by index (`moves.py`). A module whose code needs no change keeps its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from rewriters.errors import SurgeryError
from rewriters.forwards.factors import depends_on_others, is_product_with_others
from rewriters.forwards.guards import GUARDS
from rewriters.forwards.label_mask import LabelMask, SlimShapes
from rewriters.forwards.moves import commutes, only_moves, swap_tensors
from rewriters.forwards.rewritten_forward import in_positions
from rewriters.forwards.sizes import FAMILIES, Resize, Scaled, in_lowest_terms, scaled
from rewriters.forwards.tracer_patches import CONTEXTS
from rewriters.forwards.tracing import run_call
from rewriters.labelling import Labelled
from rewriters.labelling.rules import LabelledStatistic, elementwise, find_rule
from rewriters.recording import MetaMode, args_of, leaves_of, tensors_of

_CONCATENATIONS = {torch.cat, torch.concat}


_CHECKS = (*GUARDS, torch._assert)


_SILENT = {F.group_norm, F.scaled_dot_product_attention}
"""Calls that are always rewritten: with a wrong number of groups, or scale, their result has the right shape too."""


_PLAIN = frozenset((bool, int, float, str, type(None), torch.Size, torch.dtype, torch.device))
"""Types whose values can be compared with `==`."""


class CannotResizeError(SurgeryError):
    """A node holds a size and cannot be rewritten for the channels that are left."""

    def __init__(self, node: fx.Node, where: str, cause: str):
        self.node = node
        super().__init__(cause, where=where)


class Resizer:
    """Rewrites one traced graph for one label mask.

    Args:
        graph: as `tracing.trace` returns it; it isn't changed.
        known: labels of the tensors in it, by id.
        mask: which labels stay.
        where: the module's path, for errors.
        numbers: attributes that are other numbers after slimming, by name.
    """

    def __init__(
        self, graph: fx.Graph, known: Mapping[int, Labelled], mask: LabelMask, where: str,
        numbers: Mapping[str, int] | None = None,
    ):  # fmt: skip
        self._where, self._numbers = where, numbers or {}
        self._shapes = SlimShapes(known, mask)
        self._slim: dict[fx.Node, Any] = {}
        self._whole: set[fx.Node] = set()  # whose values lose nothing
        self._copies: dict[fx.Node, fx.Node] = {}
        self._given: dict[int, Tensor] = {}
        self.graph = fx.Graph()
        self.changed = False
        self.constants: dict[str, Tensor] = {}
        self._source = graph

    def run(self) -> fx.Graph:
        """The graph for the slimmed module; `changed` says whether it differs, `constants` are buffers that it reads.

        Raises:
            CannotResizeError: a node has no form for this mask.
        """
        for node in self._source.nodes:
            self._visit(node)
            if node in self._slim and self._is_whole(node):
                self._whole.add(node)
        sweep(self.graph, [copy for node, copy in self._copies.items() if node.users])
        return self.graph

    def cuts(self) -> bool:
        """Whether any tensor in the graph loses channels."""
        tensors = (leaf for node in self._source.nodes for leaf in tensors_of(node.meta.get("val")))
        return not all(map(self._shapes.is_whole, tensors))

    def _copy(self, node: fx.Node) -> None:
        copy = self._copies[node] = self.graph.node_copy(node, self._copies.__getitem__)
        if node.target in _CONCATENATIONS and isinstance(operands := args_of(node)[0], (list, tuple)):
            emptied = (self._is_emptied(operand.meta["val"]) for operand in operands)
            alive = [operand for operand, gone in zip(args_of(copy)[0], emptied, strict=True) if not gone]
            if 0 < len(alive) < len(operands):
                copy.args = (alive, *copy.args[1:])
                self.changed = True

    def _is_emptied(self, tensor: Tensor) -> bool:
        return 0 in self._shapes.shape(tensor) and 0 not in tensor.shape

    def _visit(self, node: fx.Node) -> None:
        if node.op not in ("call_function", "call_method"):
            if node.op != "output":
                self._slim[node] = self._numbers.get(str(node.target), self._expected(node))
            self._copy(node)
            if node.op == "placeholder":
                self._keep_identity(node)
        elif node.target in CONTEXTS:
            self._slim[node] = None
            self._copy(node)
        elif node.target in _CHECKS:
            if self._holds(node):
                self._copy(node)
            else:
                self._keep_guard(node)
        elif (statistic := self._by_position(node)) is not None:
            self._put_in_positions(node, statistic)
        elif self._is_untouched(node):
            self._slim[node] = self._expected(node)
            self._copy(node)
        elif node.target not in _SILENT and self._agrees(node, node.target, node.args, node.kwargs):
            self._copy(node)
            self._keep_factors(node)
        else:
            self._rewrite(node)

    def _keep_identity(self, node: fx.Node) -> None:
        """Arguments that were one tensor stay one: a forward may ask for that."""
        if isinstance(node.meta["val"], Tensor):
            self._slim[node] = self._given.setdefault(id(node.meta["val"]), self._slim[node])
        self._copies[node].meta["val"] = self._slim[node]

    def _is_whole(self, node: fx.Node) -> bool:
        """Whether slimming leaves a node's value as it is, every tensor in it with the same shape."""
        full, slim = leaves_of(node.meta["val"]), leaves_of(self._slim[node])
        return len(full) == len(slim) and all(
            one.shape == other.shape if isinstance(one, Tensor) else type(one) in _PLAIN and one == other
            for one, other in zip(full, slim, strict=True)
        )

    def _is_untouched(self, node: fx.Node) -> bool:
        """Whether neither the arguments nor the results of a call lose anything, so that it stays as it is."""
        given = (source in self._whole for source in node.all_input_nodes)
        return all(given) and all(self._shapes.is_whole(leaf) for leaf in tensors_of(node.meta["val"]))

    def _by_position(self, node: fx.Node) -> LabelledStatistic | None:
        """The channels that a call knows by position, if some of them are removed."""
        found = (
            statistic
            for statistic in node.meta["statistics"]
            if statistic.by_position and not self._shapes.mask.stays[statistic.labels].all()
        )
        return next(found, None)

    def _put_in_positions(self, node: fx.Node, statistic: LabelledStatistic) -> None:
        """Run the call at its full width, with the channels back in position, and select those left in its result."""
        stays = self._shapes.mask.stays[statistic.labels]
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), self._copies.__getitem__)
        options = dict(kwargs)
        given, *rest = args or [options.pop("input")]
        name = f"{node.name}_places"
        self.constants[name] = stays.nonzero().flatten().to(node.all_input_nodes[0].meta["val"].device)
        places = self.graph.create_node("get_attr", name)
        whole = self.graph.call_function(in_positions, (given, places, len(stays), statistic.dim))
        result = self.graph.create_node("call_function", node.target, (whole, *rest), options)
        self._copies[node] = self.graph.call_function(torch.index_select, (result, statistic.dim, places))
        self._slim[node] = self._expected(node)
        self.changed = True

    def _keep_factors(self, node: fx.Node) -> None:
        """Keep the numbers that tensors are computed with: attention is still scaled by the width before slimming."""
        if not tensors_of(node.meta["val"]):
            return
        kinds = (int, float) if all(find_rule(op) is elementwise.elementwise for op in node.meta["ops"]) else (float,)
        changed = {
            source: source.meta["val"]
            for source in node.all_input_nodes
            if type(source.meta["val"]) in kinds and self._slim[source] != source.meta["val"]
        }
        if changed:
            copy = self._copies[node]
            with self.graph.inserting_before(copy):
                kept = {source: self._kept_factor(source) for source in changed}
            given = fx.node.map_arg((node.args, node.kwargs), lambda source: kept.get(source, self._copies[source]))
            copy.args, copy.kwargs = given
            self.changed = True

    def _keep_guard(self, node: fx.Node) -> None:
        """A guard of a size that has changed is left out, but not what it says of sizes other than channels."""
        self.changed = True
        number = node.args[0]
        if node.target in GUARDS and isinstance(number, fx.Node) and is_product_with_others(number, self._slim):
            self.graph.call_function(node.target, (self._kept_factor(number), *node.args[1:]))  # type: ignore[arg-type]

    def _kept_factor(self, number: fx.Node) -> Any:
        """A number as it was before slimming; an expression if it depends on other sizes than channels."""
        left, before = self._slim[number], number.meta["val"]
        if is_product_with_others(number, self._slim):
            return self._scaled(number, before, left) if left else before
        if depends_on_others(number, self._slim):
            raise CannotResizeError(number, self._where, "it computes with channels and other sizes in one number.")
        return before

    def _holds(self, node: fx.Node) -> bool:
        args: Any = fx.node.map_arg(node.args, self._slim.__getitem__)
        return bool(args[0]) if node.target is torch._assert else args[0] == args[1]

    def _rewrite(self, node: fx.Node) -> None:
        family = FAMILIES.get(node.target)
        if family is None:
            raise CannotResizeError(node, self._where, f"{call_name(node)} holds a size that slimming changes.")
        full = tensors_of(node.meta["val"])
        slim = [self._shapes.shape(t) for t in full]
        resize = Resize(node, [tuple(t.shape) for t in full], slim, self._shapes.kept, self._left)
        target, args, kwargs = family(resize)
        numbers = fx.node.map_aggregate((args, kwargs), lambda arg: arg.value if isinstance(arg, Scaled) else arg)
        if not self._agrees(node, target, *numbers):
            raise CannotResizeError(node, self._where, f"{call_name(node)} has no form for the channels that are left.")
        self.changed |= (target, args, kwargs) != (node.target, node.args, node.kwargs)
        args, kwargs = fx.node.map_aggregate((args, kwargs), self._written)
        self._copies[node] = self.graph.create_node(node.op, target, args, kwargs)

    def _written(self, arg: Any) -> Any:
        """An argument in the new graph."""
        if isinstance(arg, Scaled):
            return self._scaled(arg.size, arg.value, arg.left)
        return self._copies[arg] if isinstance(arg, fx.Node) else arg

    def _scaled(self, size: fx.Node, value: Any, left: Any) -> fx.Node:
        return self.graph.call_function(scaled, (self._copies[size], *in_lowest_terms(value, left)))

    def _left(self, arg: Any) -> Any:
        return fx.node.map_arg(arg, self._slim.__getitem__)

    def _expected(self, node: fx.Node) -> Any:
        """A node's value with a meta tensor of the slimmed shape for each tensor in it."""
        value = node.meta["val"]
        return swap_tensors(value, {id(leaf): _stand_in(leaf, self._shapes.shape(leaf)) for leaf in tensors_of(value)})

    def _agrees(self, node: fx.Node, target: Any, args: Any, kwargs: Any) -> bool:
        """Whether this call on slimmed values gives the slimmed result, which is noted then."""
        try:
            with torch.no_grad(), MetaMode():
                got = run_call(node.op, target, args, kwargs, self._slim.__getitem__)
        except Exception:  # the op itself refuses its arguments
            return False
        if not tensors_of(node.meta["val"]):
            self._slim[node] = got
            return True
        expected = self._expected(node)
        if [tensor.shape for tensor in tensors_of(got)] != [tensor.shape for tensor in tensors_of(expected)]:
            return False
        self._slim[node] = expected
        return not only_moves(node) or commutes(node, (target, args, kwargs), self._shapes, self._slim)


def call_name(node: fx.Node) -> str:
    """The function or method that a node calls, for messages: `einsum`, `.view`."""
    return f".{node.target}" if node.op == "call_method" else str(getattr(node.target, "__name__", node.target))


def sweep(graph: fx.Graph, used: Iterable[fx.Node]) -> None:
    """Erase those of the nodes in `used` that have no user any more, last first."""
    for node in reversed(list(used)):
        if not node.users and node.op not in ("placeholder", "output"):
            graph.erase_node(node)


def _stand_in(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    return torch.empty(shape, dtype=tensor.dtype, device="meta")
