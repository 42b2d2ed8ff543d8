"""Rewrite a traced forward for the channels that are left.

Every call that something goes of is run on stand-ins of the slimmed values. Where the call as it stands gives
what slimming its result would give, it stays; where it doesn't, its sizes are written anew and it is run
again. For calls that only move data this is checked index by index: moving and then slimming must be slimming
and then moving.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch.utils._pytree import tree_map

from rewriters.errors import SurgeryError
from rewriters.forwards.rewritten_forward import guard, in_places
from rewriters.forwards.sizes import FAMILIES, Resize, Scaled, scaled
from rewriters.forwards.tracer_patches import AUTOCAST
from rewriters.forwards.tracing import run_call
from rewriters.labelling import Labelled, parts, reshaped, varying
from rewriters.labelling.rules import RULES, Look, Rule, elementwise, find_rule, movement
from rewriters.recording import MetaMode, leaves_of, tensors_of

_CONCATENATIONS = {torch.cat, torch.concat}


def _ops_of(*rules: Rule) -> frozenset[Any]:
    return frozenset(op for op, rule in RULES.items() if rule in rules) | elementwise.COPIES


_MOVES, _RESHAPING = _ops_of(*movement.RULES_THAT_MOVE), _ops_of(movement.reshape)
_ROLLING, _ROLLING_OR_JOINING = _ops_of(movement.roll), _ops_of(movement.roll, movement.cat)
_REORDERING = _ops_of(movement.reorder)
"""Calls without a size: slimmed data are moved as whole data are."""

_GROUPED = {F.group_norm}
"""Calls whose result has the right shape with another number of groups too: they are always written anew."""

_RESHAPES = {"view": "reshape", "view_as": "reshape_as"}

_PLAIN = frozenset((bool, int, float, str, type(None), torch.Size, torch.dtype, torch.device))
"""Types of values that are what they are equal to."""

_TO_ANOTHERS_SHAPE = {"view_as", "reshape_as"}
"""Calls whose first operand is reshaped, and whose second gives its shape alone."""


class Unwritable(SurgeryError):
    """A node that holds a size and cannot be written for what is left."""

    def __init__(self, node: fx.Node, where: str, cause: str):
        self.node = node
        super().__init__(cause, where=where)


@dataclass(frozen=True)
class Cut:
    """Which labels stay: `stays` is bool, of shape (labels,)."""

    stays: Tensor

    def kept(self, value: Labelled, dim: int) -> Tensor:
        """Which indices along a dimension stay, bool of shape (size,)."""
        layer = value.layer(dim % value.ndim)
        if layer is None:
            return torch.ones(value.shape[dim], dtype=torch.bool)
        stays = self.stays[layer]
        others = [d for d in varying(layer) if d != dim % value.ndim]
        along = stays.amax(others) if others else stays
        return along.flatten()

    def shape(self, value: Labelled) -> tuple[int, ...]:
        """What is left of its shape."""
        sizes = list(value.shape)
        for dim in _labelled(value):
            sizes[dim] = int(self.kept(value, dim).sum())
        return tuple(sizes)

    def slim(self, tensor: Tensor, value: Labelled, first: int = 0) -> Tensor:
        """The tensor without the indices that go; its dimensions are those of `value` from `first` on.

        What is expanded along a dimension stays so: it takes no memory.
        """
        expanded = [dim for dim in range(tensor.ndim) if tensor.stride(dim) == 0 and tensor.shape[dim]]
        sizes = list(tensor.shape)
        for dim in expanded:
            tensor = tensor.narrow(dim, 0, 1)
        for dim in range(tensor.ndim):
            kept = self.kept(value, first + dim)
            if kept.all():
                continue
            sizes[dim] = int(kept.sum())
            if dim not in expanded:
                tensor = tensor.index_select(dim, kept.nonzero().flatten().to(tensor.device))
        return tensor.expand(sizes) if expanded else tensor


def _labelled(value: Labelled) -> set[int]:
    """Dimensions along which it has labels: the others stay whole."""
    return {dim for layer in value.layers for dim in varying(layer)}


class Resizer:
    """Rewrites one traced graph for one cut.

    Args:
        graph: as `tracing.trace` returns it; left as it is.
        known: labels of the tensors in it, by id.
        cut: what stays.
        where: the module's path, for errors.
    """

    def __init__(self, graph: fx.Graph, known: Mapping[int, Labelled], cut: Cut, where: str):
        self._known, self._cut, self._where = known, cut, where
        self._slim: dict[fx.Node, Any] = {}
        self._whole: set[fx.Node] = set()  # of whose values nothing goes
        self._shapes: dict[int, tuple[int, ...]] = {}
        self._copies: dict[fx.Node, fx.Node] = {}
        self.graph = fx.Graph()
        self.changed = False
        self.constants: dict[str, Tensor] = {}
        self._source = graph

    def run(self) -> fx.Graph:
        """The graph for the slimmed module; `changed` tells whether it differs, `constants` are buffers it takes.

        Raises:
            Unwritable: a node has no form for this cut.
        """
        for node in self._source.nodes:
            self._visit(node)
            if node in self._slim and self._is_whole(node):
                self._whole.add(node)
        sweep(self.graph, [copy for node, copy in self._copies.items() if node.users])
        return self.graph

    def cuts(self) -> bool:
        """Whether any tensor in the graph loses something."""
        tensors = (leaf for node in self._source.nodes for leaf in tensors_of(node.meta.get("val")))
        return any(self._shape(tensor) != tuple(tensor.shape) for tensor in tensors)

    def _copy(self, node: fx.Node) -> None:
        copy = self._copies[node] = self.graph.node_copy(node, self._copies.__getitem__)
        if node.target in _CONCATENATIONS and isinstance(node.args[0], (list, tuple)):
            shapes = (self._shape(operand.meta["val"]) for operand in node.args[0])
            alive = [operand for operand, shape in zip(copy.args[0], shapes, strict=True) if 0 not in shape]
            if 0 < len(alive) < len(node.args[0]):
                copy.args = (alive, *copy.args[1:])
                self.changed = True

    def _visit(self, node: fx.Node) -> None:
        if node.op not in ("call_function", "call_method"):
            if node.op != "output":
                self._slim[node] = self._expected(node)
            self._copy(node)
        elif node.target in AUTOCAST:
            self._slim[node] = None
            self._copy(node)
        elif node.target is guard or node.target is torch._assert:
            if self._holds(node):
                self._copy(node)
            else:
                self.changed = True  # it spoke of a size that is no more
        elif (look := self._by_place(node)) is not None:
            self._put_in_places(node, look)
        elif self._is_untouched(node):
            self._slim[node] = self._expected(node)
            self._copy(node)
        elif node.target not in _GROUPED and self._agrees(node, node.target, node.args, node.kwargs):
            self._copy(node)
            self._keep_factors(node)
        else:
            self._rewrite(node)

    def _is_whole(self, node: fx.Node) -> bool:
        """Whether a node's value is the same slimmed, every tensor in it of the same shape."""
        full, slim = leaves_of(node.meta["val"]), leaves_of(self._slim[node])
        return len(full) == len(slim) and all(
            one.shape == other.shape if isinstance(one, Tensor) else type(one) in _PLAIN and one == other
            for one, other in zip(full, slim, strict=True)
        )

    def _is_untouched(self, node: fx.Node) -> bool:
        """Whether nothing goes of what a call is given and gives: as it stands it gives what it gave."""
        given = (source in self._whole for source in node.all_input_nodes)
        return all(given) and all(self._shape(leaf) == leaf.shape for leaf in tensors_of(node.meta["val"]))

    def _by_place(self, node: fx.Node) -> Look | None:
        """The channels that a call knows by their places, if some of them go."""
        looks = (look for look in node.meta["looks"] if look.places and not self._cut.stays[look.labels].all())
        return next(looks, None)

    def _put_in_places(self, node: fx.Node, look: Look) -> None:
        """The call at its full width, and of what it gives the channels that are left."""
        stays = self._cut.stays[look.labels]
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), self._copies.__getitem__)
        options = dict(kwargs)
        given, *rest = args or [options.pop("input")]
        name = f"{node.name}_places"
        self.constants[name] = stays.nonzero().flatten().to(node.all_input_nodes[0].meta["val"].device)
        places = self.graph.create_node("get_attr", name)
        whole = self.graph.call_function(in_places, (given, places, len(stays), look.dim))
        result = self.graph.call_function(node.target, (whole, *rest), options)
        self._copies[node] = self.graph.call_function(torch.index_select, (result, look.dim, places))
        self._slim[node] = self._expected(node)
        self.changed = True

    def _keep_factors(self, node: fx.Node) -> None:
        """A number that a tensor is computed with stays what it was: attention is scaled by the width it had."""
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
            given = fx.node.map_arg((node.args, node.kwargs), lambda source: changed.get(source, self._copies[source]))
            copy.args, copy.kwargs = given
            self.changed = True

    def _holds(self, node: fx.Node) -> bool:
        args = fx.node.map_arg(node.args, self._slim.__getitem__)
        return bool(args[0]) if node.target is torch._assert else args[0] == args[1]

    def _rewrite(self, node: fx.Node) -> None:
        family = FAMILIES.get(node.target)
        if family is None:
            raise Unwritable(node, self._where, f"{node.format_node()} holds a size that slimming changes.")
        full = tensors_of(node.meta["val"])
        slim = [self._shape(t) for t in full]
        resize = Resize(node, [tuple(t.shape) for t in full], slim, self._kept, self._left)
        target, args, kwargs = family(resize)
        numbers = fx.node.map_aggregate((args, kwargs), lambda arg: arg.value if isinstance(arg, Scaled) else arg)
        if not self._agrees(node, target, *numbers):
            raise Unwritable(node, self._where, f"{node.format_node()} has no form for the channels that are left.")
        self.changed |= (target, args, kwargs) != (node.target, node.args, node.kwargs)
        args, kwargs = fx.node.map_aggregate((args, kwargs), self._written)
        self._copies[node] = self.graph.create_node(node.op, target, args, kwargs)

    def _written(self, arg: Any) -> Any:
        """An argument as it stands in the new graph."""
        if isinstance(arg, Scaled):
            return self.graph.call_function(scaled, (self._copies[arg.size], arg.value, arg.left))
        return self._copies[arg] if isinstance(arg, fx.Node) else arg

    def _labels(self, tensor: Tensor) -> Labelled:
        return self._known.get(id(tensor)) or Labelled.unknown(tensor)

    def _left(self, arg: Any) -> Any:
        return fx.node.map_arg(arg, self._slim.__getitem__)

    def _kept(self, tensor: Tensor, dim: int) -> Tensor:
        return self._cut.kept(self._labels(tensor), dim)

    def _shape(self, tensor: Tensor) -> tuple[int, ...]:
        if id(tensor) not in self._shapes:
            self._shapes[id(tensor)] = self._cut.shape(self._labels(tensor))
        return self._shapes[id(tensor)]

    def _expected(self, node: fx.Node) -> Any:
        """A node's value, every tensor in it slimmed (its shape, that is)."""
        value = node.meta["val"]
        return _swap(value, {id(leaf): _stand_in(leaf, self._shape(leaf)) for leaf in tensors_of(value)})

    def _agrees(self, node: fx.Node, target: Any, args: Any, kwargs: Any) -> bool:
        """Whether this call on slimmed values gives the slimmed result; notes the result."""
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
        moves = node.meta["ops"] and set(node.meta["ops"]) <= _MOVES
        return not moves or self._commutes(node, target, args, kwargs)

    def _commutes(self, node: fx.Node, target: Any, args: Any, kwargs: Any) -> bool:
        """Whether a move of the slimmed data is the slimmed result of the move, index by index."""
        ops = set(node.meta["ops"])
        if ops <= _REORDERING:
            return True
        operands = {id(leaf): leaf for source in node.all_input_nodes for leaf in tensors_of(source.meta["val"])}
        results = tensors_of(node.meta["val"])
        if target == node.target and all(self._shape(leaf) == leaf.shape for leaf in (*operands.values(), *results)):
            return True  # nothing is cut here
        if ops <= _RESHAPING and (len(operands) == 1 or target in _TO_ANOTHERS_SHAPE):
            return self._reshapes(next(iter(operands.values())), *results)
        once = self._left_out(node, [*operands.values(), *results])
        full, slim, start = {}, {}, 0
        for key, leaf in operands.items():
            numbers = _numbers(self._labels(leaf), start)
            start += numbers.numel()
            full[key] = _repeated(numbers, leaf.shape, once)
            slim[key] = _repeated(self._cut.slim(numbers, self._labels(leaf)), self._shape(leaf), once)
        # Numbers that are repeated can't be viewed, only reshaped.
        moves = [_RESHAPES.get(move, move) for move in (node.target, target)]
        before = run_call(node.op, moves[0], node.args, node.kwargs, lambda n: _swap(n.meta["val"], full))
        after = run_call(
            node.op, moves[1], args, kwargs,
            lambda n: _swap(n.meta["val"], slim) if tensors_of(n.meta["val"]) else self._slim[n],
        )  # fmt: skip
        return all(
            _equal(self._cut.slim(_once(moved, labels), labels), got)
            for moved, got, labels in zip(
                tensors_of(before), tensors_of(after), map(self._labels, results), strict=True
            )
        )

    def _left_out(self, node: fx.Node, tensors: list[Tensor]) -> set[int]:
        """Dimensions that a roll or a concatenation can be compared without: nothing is labelled along them."""
        dims = node.args[2] if len(node.args) > 2 else node.kwargs.get("dims")
        in_one_row = dims is None or dims in ((), [])
        ops, values = set(node.meta["ops"]), [self._labels(tensor) for tensor in tensors]
        if not ops <= _ROLLING_OR_JOINING or (ops <= _ROLLING and in_one_row) or len({v.ndim for v in values}) > 1:
            return set()
        return set(range(values[0].ndim)).difference(*map(_labelled, values))

    def _reshapes(self, operand: Tensor, result: Tensor) -> bool:
        """As `_commutes`, for a tensor that is reshaped to the right shape.

        Where the same dimensions become one another before and after slimming, each part is looked at by itself: a
        kernel that is flattened along its inputs has as many numbers as inputs and outputs, and not one an element.
        """
        slim = self._shape(operand), self._shape(result)
        found = list(parts(operand.shape, result.shape))
        if 0 in slim[0] or list(parts(*slim)) != found:
            found = [(slice(0, operand.ndim), slice(0, result.ndim))]
        return all(self._part_reshapes(operand, result, old, new) for old, new in found)

    def _part_reshapes(self, operand: Tensor, result: Tensor, old: slice, new: slice) -> bool:
        """Whether these dimensions of one tensor become those of another, index by index."""
        of, to = self._labels(operand), self._labels(result)
        numbers = _numbers(of, 0, old)
        before = reshaped(numbers, operand.shape[old], result.shape[new])
        slim = self._cut.slim(numbers, of, old.start)
        after = reshaped(slim, self._shape(operand)[old], self._shape(result)[new])
        return _equal(self._cut.slim(_once(before, to, new.start), to, new.start), after)


def sweep(graph: fx.Graph, used: Iterable[fx.Node]) -> None:
    """Erase those of the nodes that were `used` and have no user any more, the last first."""
    for node in reversed(list(used)):
        if not node.users and node.op not in ("placeholder", "output"):
            graph.erase_node(node)


def _stand_in(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    return torch.empty(shape, dtype=tensor.dtype, device="meta")


def _swap(value: Any, others: Mapping[int, Tensor]) -> Any:
    """`value` with another tensor in the place of each, by its id."""
    if isinstance(value, Tensor):
        return others[id(value)]
    return tree_map(lambda leaf: others[id(leaf)] if isinstance(leaf, Tensor) else leaf, value)


def _numbers(value: Labelled, start: int, dims: slice = slice(None)) -> Tensor:
    """Numbers from `start` on, one for each combination of labelled indices, of size 1 along the other dimensions.

    With `dims` for some of its dimensions only.
    """
    along = [value.shape[dim] if value.layer(dim) is not None else 1 for dim in range(value.ndim)[dims]]
    return torch.arange(start, start + prod(along), dtype=torch.int32).view(along)


def _repeated(numbers: Tensor, shape: tuple[int, ...], once: set[int]) -> Tensor:
    """The numbers repeated to a shape, but once along these dimensions."""
    return numbers.expand([1 if dim in once else size for dim, size in enumerate(shape)])


def _once(numbers: Tensor, value: Labelled, first: int = 0) -> Tensor:
    """Repeated numbers once, along dimensions without labels; they are those of `value` from `first` on."""
    for dim in range(numbers.ndim):
        if numbers.shape[dim] > 1 and numbers.stride(dim) == 0 and value.layer(first + dim) is None:
            numbers = numbers.narrow(dim, 0, 1)
    return numbers


def _equal(numbers: Tensor, got: Tensor) -> bool:
    if any(size not in (1, other) for size, other in zip(numbers.shape, got.shape, strict=True)):
        return False  # some ops give other shapes where nothing is left
    numbers = numbers.expand(got.shape)
    for dim in range(got.ndim):
        if got.shape[dim] > 1 and numbers.stride(dim) == got.stride(dim) == 0:
            numbers, got = numbers.narrow(dim, 0, 1), got.narrow(dim, 0, 1)
    return torch.equal(numbers, got)
