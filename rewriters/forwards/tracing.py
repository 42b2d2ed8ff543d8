"""Trace one module's own forward with torch.fx, its children being leaves.

Unlike in torch.fx.symbolic_trace, every proxy knows the value that it stands for (a fake tensor, a size). So control
flow on shapes, types and lengths can be traced. What was decided that way is written into the graph as a guard, and
sizes stay expressions: the traced forward runs at other batch sizes and resolutions, or raises if it can't.
"""

from __future__ import annotations

import functools
import inspect
import operator
from collections import ChainMap
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from rewriters.errors import TraceError
from rewriters.forwards.attribute_reads import AskedMode, AttributeReads, follows_input
from rewriters.forwards.following import unfollowed
from rewriters.forwards.guards import GUARDS, guard, guard_attribute
from rewriters.forwards.multi_head_attention import HINTS, written_out_call
from rewriters.forwards.proxies import ValueProxy, ValueTracer
from rewriters.forwards.read_code import code_compares_identity, line_of_caller, methods_of_caller
from rewriters.forwards.rewritten_forward import own_forward
from rewriters.forwards.traced_labels import TracedLabels
from rewriters.forwards.tracer_patches import CONTEXTS, MATH, conversions_followed, followed, rewritten_code_followed
from rewriters.interrupts import let_signals_in
from rewriters.labelling import Labelled, Labelling
from rewriters.recording import (
    Capture,
    ModuleCall,
    all_tensors,
    attributes_preserved,
    constant,
    drawn_since,
    generators_kept,
    is_draw,
    maker_of,
    map_tensors,
    only_restrides,
    plain_kind,
    random_states,
    reshapes_in_place,
    run_on_fakes,
    tensors_of,
)

_len = len  # `builtins.len` is patched while a forward is traced

_GUARDED = (bool, int, float, str, type(None), torch.dtype, torch.layout, torch.device)
"""Types of values that control flow depends on, and that can be compared."""


class _OpLog(TorchDispatchMode):
    """Notes every ATen call that returns tensors, with its arguments and result."""

    def __init__(self, mode: FakeTensorMode) -> None:
        super().__init__()
        self._mode = mode
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        restrides = only_restrides(func, args)
        if reshapes_in_place(func) and not restrides:
            raise TraceError(f"{func} changes the shape of a tensor in place")
        out = run_on_fakes(self._mode, func, args, kwargs or {})
        # A call that returns no tensor is a query (of a device, a layout).
        if not restrides and tensors_of(out):
            self.calls.append((func, args, kwargs or {}, out))
        return out


class _Tracer(ValueTracer):
    """Traces a module's forward.

    Args:
        root: the module.
        call: its recorded call, in `captured`.
        captured: the captured model.
        labelling, known: labels of the captured model, and of its tensors by id.
        followed: whether numbers that are attributes of modules stay expressions (`AttributeReads`).
    """

    proxy_buffer_attributes = True

    def __init__(
        self, root: nn.Module, call: ModuleCall, captured: Capture, labelling: Labelling,
        known: Mapping[int, Labelled], followed: bool,
    ):  # fmt: skip
        super().__init__(autowrap_modules=(), autowrap_functions=(*MATH, *GUARDS))  # type: ignore[arg-type]  # fx: one module
        self.attributes = AttributeReads(root, self._read, self.guard, followed)
        self._captured, self._call, self._labelling = captured, call, labelling
        self._children = iter(call.children)
        self.labels = TracedLabels(call, labelling, known)
        self.wrote_out = False

    def create_args_for_root(self, root_fn, is_module, concrete_args=None):
        # fx takes the forward from the class; the instance may have one that was rewritten before.
        root_fn = own_forward(self.root, self._call.args, self._call.kwargs)
        # Keep the signature, so that callers of the rewritten forward see no difference.
        signature = inspect.signature(root_fn)
        bound = signature.bind(self.root, *self._call.args, **self._call.kwargs)
        passed = set(bound.arguments) if hasattr(root_fn, "__wrapped__") else set(signature.parameters)
        bound.apply_defaults()
        asks = code_compares_identity(inspect.unwrap(root_fn).__code__)
        named = self._call.kwargs
        by_place: list[Any] = [self.root]
        by_name: dict[str, Any] = {}
        for name, parameter in list(signature.parameters.items())[1:]:
            given = self._placeholder(parameter, bound.arguments[name])
            if asks and type(given) is ValueProxy:
                given = self._told_apart(given, [*by_place[1:], *by_name.values()])
            if parameter.kind is parameter.VAR_POSITIONAL:
                by_place.extend(given)
            elif parameter.kind is parameter.VAR_KEYWORD:
                by_name.update(given)
            elif name not in passed:  # a decorator may set it
                self._guard_default(given, name)
            elif parameter.kind is parameter.KEYWORD_ONLY or (hasattr(root_fn, "__wrapped__") and name in named):
                by_name[name] = given
            else:
                by_place.append(given)
        return functools.partial(root_fn, **by_name), by_place

    def _placeholder(self, parameter: inspect.Parameter, value: Any) -> Any:
        """What the forward gets for a parameter. Whether an optional argument was given is guarded."""
        kinds: dict[Any, str] = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}
        stars = kinds.get(parameter.kind, "")
        default = () if parameter.default is parameter.empty else (_plain(parameter.default),)
        node = self.create_node("placeholder", f"{stars}{parameter.name}", default, {})
        node.meta["val"] = _plain(value)
        proxy = self.proxy(node)
        if parameter.name in HINTS.get(type(self.root), ()):
            return proxy
        first = len(self.graph.find_nodes(op="placeholder")) == 1  # nobody leaves that one out
        optional = parameter.default is None or (parameter.default is parameter.empty and not (stars or first))
        if optional and value is not None:
            self._guard_given(proxy, parameter.name)
        return self._argument(proxy, parameter.name)

    def _guard_given(self, proxy: ValueProxy, name: str) -> None:
        absent = self.create_proxy("call_function", operator.is_, (proxy, None), {})
        self.guard(absent, f"whether the argument {name} is None")

    def _guard_default(self, given: Any, name: str) -> None:
        if type(given) is ValueProxy and isinstance(given.value, _GUARDED):
            self.guard(given, name)

    def _told_apart(self, given: ValueProxy, others: list[Any]) -> ValueProxy:
        """An argument in a forward that asks `is`: where it is another argument too, that one's proxy."""
        for other in (other for other in others if type(other) is ValueProxy):
            same = self.create_proxy("call_function", operator.is_, (other, given), {})
            self.guard(same, f"{other.node.target} is {given.node.target}")
            if same.value:
                return other
        return given

    def _argument(self, proxy: ValueProxy, name: str) -> Any:
        """A proxy for a tensor or number, a container of proxies for a container, else the value itself.

        The forward may look at every entry of a container, so their number is guarded, and whether a tensor is there.
        """
        value = proxy.value
        kind = plain_kind(value)
        if kind is not None:
            self.guard(self.create_proxy("call_function", _len, (proxy,), {}), f"the number of entries of {name}")
            entries = {}
            for key in value if kind is dict else range(len(value)):
                entry, place = proxy[key], f"{name}[{key!r}]"
                if isinstance(entry.value, Tensor):
                    self._guard_given(entry, place)
                entries[key] = self._argument(entry, place)
            made = entries if kind is dict else kind(entries.values())
            return made if type(value) is kind else maker_of(value)(made)
        if isinstance(value, Tensor) or type(value) in (int, float):
            return proxy
        if isinstance(value, _GUARDED):
            self.guard(proxy, name)
        return value

    def concrete(self, proxy: ValueProxy) -> Any:
        """The value of a proxy, with a guard in the graph that it is the same whenever the graph runs."""
        if isinstance(proxy.value, Tensor):
            raise TraceError("its control flow depends on the values of a tensor")
        if proxy.node.target is getattr and proxy.node.args[1:] == ("requires_grad",):
            raise TraceError(f"it asks whether a tensor requires gradients, at {line_of_caller()}")
        if isinstance(proxy.value, _GUARDED):
            self.guard(proxy, f"a value at {line_of_caller()}")
        return proxy.value

    def guard(self, proxy: ValueProxy, what: str) -> None:
        """Have the graph raise where this value is another than now."""
        target = guard if follows_input(proxy.node) else guard_attribute
        self.create_node("call_function", target, (proxy.node, _plain(proxy.value), what), {}).meta["val"] = None

    def _read(self, source: str | Callable[[], Any], value: Any) -> ValueProxy:
        node = self.create_node("get_attr" if isinstance(source, str) else "call_function", source, (), {})
        node.meta.update(val=value, ops=[], statistics=[])
        return self.proxy(node)

    def has_channels(self, tensor: Tensor, dim: int) -> bool:
        return self.labels.of(tensor).layer(dim) is not None

    def proxy(self, node: fx.Node) -> ValueProxy:
        return ValueProxy(node, self)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """A child's call is one node. A module that the forward made, or keeps in a list, is followed."""
        if m not in (self.submodule_paths or {}):
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)

    def create_arg(self, a: Any) -> Any:
        # By type, because `isinstance` answers for a proxy's value.
        if type(a) is ValueProxy:
            return a.node
        if type(a) is AskedMode:
            return bool(a)
        if isinstance(a, np.generic):
            return _plain(a)
        if isinstance(a, Tensor) and not isinstance(a, nn.Parameter):
            return self._plain_tensor(a)
        kind = plain_kind(a)
        if kind is not None and type(a) is not kind:
            return self.create_proxy("call_function", maker_of(a), (kind(a),), {}).node
        arg = super().create_arg(a)
        if type(arg) is fx.Node and "val" not in arg.meta:  # a layer that is passed on, a named tuple, a dataclass
            value = a if arg.op == "get_attr" else run_call(arg.op, arg.target, arg.args, arg.kwargs, _value_of)
            arg.meta.update(val=value, ops=[], statistics=[])
        return arg

    def _plain_tensor(self, tensor: Tensor) -> fx.Node:
        """A node for a tensor that is a module's attribute. One made in the forward is refused: fx would lose it."""
        name = next((name for value, name in self.tensor_attrs.items() if value is tensor), None)
        if name is None:
            raise TraceError("it computes with a tensor whose creation torch.fx has not seen")
        node = self.create_node("get_attr", name, (), {})
        node.meta["val"] = self._captured.places.get(f"{self._call.path}.{name}".lstrip("."))
        if node.meta["val"] is None:
            node.meta["val"] = constant(self._captured.mode, tensor)
        return node

    def create_proxy(self, kind, target, args, kwargs, *rest, **options):
        if kind == "call_function" and (written_out := written_out_call(target, kwargs)) is not None:
            self.wrote_out = True
            return written_out(*args, **kwargs)
        self.attributes.code.add_callers()
        with unfollowed():
            proxy = super().create_proxy(kind, target, args, kwargs, *rest, **options)
            self._follow(proxy.node)
        # A list or dict from a module becomes a real one, which the forward can change.
        changeable = kind == "call_module" and plain_kind(proxy.value) not in (None, tuple)
        return self._argument(proxy, str(target)) if changeable else proxy

    def _follow(self, node: fx.Node) -> None:
        """Note a new node's value, the ATen ops that it ran, and the labels of their results."""
        node.meta.update(val=None, ops=[], statistics=[], methods=methods_of_caller(self.root))
        if node.target in CONTEXTS:
            return
        if node.op == "get_attr":
            node.meta["val"] = self._attribute(str(node.target))
            return
        if node.op == "call_module":
            child = self._next_child(str(node.target))
            node.meta["val"] = child.output
            given = fx.node.map_arg((node.args, node.kwargs), _value_of)
            self.labels.link(given, (child.args, child.kwargs))
            return
        log = _OpLog(self._captured.mode)
        with torch.no_grad(), self._captured.mode, log:
            value = run_call(node.op, node.target, node.args, node.kwargs, _value_of)
        node.meta["ops"] = [op for op, *_ in log.calls]
        node.meta["draws"] = any(is_draw(op, args, kwargs) for op, args, kwargs, _ in log.calls)
        findings = self._labelling.findings.apart()
        same: dict[int, Tensor] = {}
        for call in log.calls:
            self.labels.add(*call, findings, same)
        if same:  # pytree makes a tuple of a torch.Size
            value = map_tensors(lambda tensor: same.get(id(tensor), tensor), value)
        node.meta["val"] = value
        operands = [_value_of(source) for source in node.all_input_nodes]
        node.meta["statistics"] = [self.labels.along(statistic, operands) for statistic in findings.statistics]

    def _attribute(self, name: str) -> Tensor:
        """The fake tensor for a parameter or buffer of the module."""
        path = f"{self._call.path}.{name}".lstrip(".")
        if path not in self._captured.places:
            raise TraceError(f"it reads {name}, which is not a parameter or buffer")
        return self._captured.places[path]

    def _next_child(self, name: str) -> ModuleCall:
        """The recorded call of the child that is called now."""
        path = f"{self._call.path}.{name}".lstrip(".")
        child = next(self._children, None)
        if child is None or path not in child.names:
            raise TraceError(f"traced, it calls {path}; recorded, it called {child.path if child else 'nothing'}")
        return child


def _plain(value: Any) -> Any:
    """A numpy number as a number of Python: generated code has no name for numpy."""
    return value.item() if isinstance(value, np.generic) else value


def run_call(op: str, target: Any, args: Any, kwargs: Any, value_of: Callable[[fx.Node], Any]) -> Any:
    """Run a call_function or call_method, with `value_of(node)` for each node among its arguments."""
    args, kwargs = fx.node.map_arg((args, kwargs), value_of)
    return getattr(args[0], target)(*args[1:], **kwargs) if op == "call_method" else target(*args, **kwargs)


def _value_of(node: fx.Node) -> Any:
    return node.meta["val"]


_READS = (getattr, operator.getitem, torch.is_grad_enabled)


def _drop_unused_reads(graph: fx.Graph) -> None:
    """Erase reads without a user: of a child's parameter, say, as the child may be removed."""
    for node in reversed(graph.nodes):
        if not node.users and (node.op == "get_attr" or node.target in _READS):
            graph.erase_node(node)


def _traced(tracer: _Tracer, module: nn.Module, call: ModuleCall) -> fx.Graph:
    path = call.path
    try:
        forward = own_forward(module, call.args, call.kwargs)
        with (
            attributes_preserved(module.modules()), generators_kept(module), followed(tracer, tracer.attributes),
            conversions_followed(type(module).forward), rewritten_code_followed(forward),
        ):  # fmt: skip
            before, code = random_states(), tracer.attributes.code
            code.add(forward)
            try:
                graph = tracer.trace(module)
            finally:
                written = code.restore()
            if written:
                raise TraceError(f"it keeps the variable {written} from one call to the next")
            if drawn_since(before):
                raise TraceError("it draws Python's or NumPy's random numbers, of which torch.fx would keep one draw")
        with graph.inserting_before(next(node for node in graph.nodes if node.op != "placeholder")):
            tracer.attributes.guard_named()
    except TraceError as error:
        raise TraceError(error.cause, where=path) from error
    except Exception as error:  # user code can do anything with a proxy
        raise TraceError(f"torch.fx cannot trace it ({error})", where=path) from error
    return graph


def trace(module: nn.Module, call: ModuleCall, captured: Capture, labelling: Labelling,
          known: Mapping[int, Labelled]) -> tuple[fx.Graph, Mapping[int, Labelled], bool]:  # fmt: skip
    """Trace `module`'s forward as it ran in `call`.

    Returns:
        The graph, and the labels of all tensors in it by id. Each node's meta has `val` (its value), `ops` (the ATen
        ops that it ran) and `statistics` (those that these take across channels). And whether an equivalent that is
        written out was traced for a call in it.

    Raises:
        TraceError: torch.fx cannot trace the forward; the message says why.
    """
    let_signals_in()
    tracer = _Tracer(module, call, captured, labelling, known, followed=True)
    try:
        graph = _traced(tracer, module, call)
    except TraceError:
        if not tracer.attributes.followed:
            raise
        tracer = _Tracer(module, call, captured, labelling, known, followed=False)
        graph = _traced(tracer, module, call)
    returned = next(node for node in graph.nodes if node.op == "output").args[0]
    tracer.labels.link(fx.node.map_arg(returned, _value_of), call.output)
    _drop_unused_reads(graph)
    in_graph = set(map(id, all_tensors(graph)))  # these stay alive
    found, recorded = tracer.labels.known.maps
    left = {key: labels for key, labels in found.items() if key in in_graph}
    return graph, ChainMap(left, recorded), tracer.wrote_out
