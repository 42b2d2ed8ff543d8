"""Trace one module's own forward with torch.fx, its children being leaves.

Unlike torch.fx.symbolic_trace, every proxy here knows the value it stands for (a fake tensor, a size), so
that control flow on shapes, types and lengths can be followed. What was decided that way is written into
the graph as a guard, and sizes stay expressions: the traced forward runs at other batch sizes and
resolutions, and says so where it can't.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import _symbolic_trace
from torch.fx.proxy import Attribute
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from rewriters.capture import Capture, ModuleCall, only_restrides
from rewriters.errors import AutogateError
from rewriters.forward import guard, own_forward
from rewriters.labels import Labelled
from rewriters.preserving import attributes_preserved
from rewriters.propagate import Labelling
from rewriters.rules import Findings, OpCall
from rewriters.rules.elementwise import meet
from rewriters.without_data import on_fakes

_FACTORIES = {
    "arange", "as_tensor", "empty", "eye", "full", "full_like", "linspace", "ones", "rand", "randint", "randn",
    "randperm", "tensor", "zeros",
}  # fmt: skip
"""Functions of torch that make tensors from numbers: all their calls have to be seen."""


class TraceError(AutogateError):
    """A module's forward cannot be followed by torch.fx."""


class AskedMode:
    """Stands in a module's `training` while its forward is traced: eval mode, and a note whether that was asked for."""

    def __init__(self) -> None:
        self.asked = False

    def __bool__(self) -> bool:
        self.asked = True
        return False

    def __eq__(self, other: object) -> bool:
        return bool(self) == other

    def __hash__(self) -> int:
        return hash(bool(self))


class _OpLog(TorchDispatchMode):
    """Notes every ATen call that gives tensors, with its arguments and result."""

    def __init__(self, mode: FakeTensorMode) -> None:
        super().__init__()
        self._mode = mode
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        restrides = only_restrides(func, args)
        out = on_fakes(self._mode, func, args, kwargs or {})
        # A call that gives no tensor is a question (its device, its layout).
        if not restrides and any(isinstance(leaf, Tensor) for leaf in tree_leaves(out)):
            self.calls.append((func, args, kwargs or {}, out))
        return out


class _Valued(fx.Proxy):
    """A proxy that knows the value it stands for."""

    @property
    def value(self) -> Any:
        return self.node.meta["val"]

    @property
    def __class__(self):  # isinstance(x, torch.Tensor) must answer for the value
        return type(self.value)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name.endswith("__"):
            raise AttributeError(name)
        if callable(getattr(self.value, name)):
            return Attribute(self, name)
        return self.tracer.create_proxy("call_function", getattr, (self, name), {})

    def __iter__(self):
        return iter([self[index] for index in range(len(self.value))])

    def __setitem__(self, key: Any, value: Any) -> None:
        """x[key] = y, written as what it does: y is copied into a view of x."""
        if not isinstance(self.value, Tensor) or not _makes_view(key):
            raise TraceError("it assigns to elements picked by a tensor or a list")
        view = self[key]
        view.copy_(value) if isinstance(value, Tensor) else view.fill_(value)

    def __len__(self) -> int:
        return len(self.value)

    def __bool__(self) -> bool:
        return bool(self.tracer.concrete(self))

    def __int__(self) -> int:
        return int(self.tracer.concrete(self))

    def __float__(self) -> float:
        return float(self.tracer.concrete(self))

    def __index__(self) -> int:
        return self.tracer.concrete(self).__index__()

    def __contains__(self, item: Any) -> bool:
        return item in self.tracer.concrete(self)

    def __format__(self, spec: str) -> str:
        return format(self.value, spec)


@functools.cache
def _builtins(space: types.ModuleType) -> dict[str, Callable[..., Any]]:
    torch.overrides.get_overridable_functions()  # reads the same names once, which should be when nothing is wrapped
    builtins = {name: value for name, value in vars(space).items() if isinstance(value, types.BuiltinFunctionType)}
    return {name: value for name, value in builtins.items() if not value.__name__.startswith("_")}


def _makes_view(key: Any) -> bool:
    """Whether indexing by `key` gives a view (numbers, slices, None and ...), not a copy."""
    items = key if isinstance(key, tuple) else (key,)
    return all(item is None or item is Ellipsis or isinstance(item, (int, slice)) for item in items)


class _Tracer(fx.Tracer):
    proxy_buffer_attributes = True

    def __init__(self, captured: Capture, call: ModuleCall, labelling: Labelling, known: dict[int, Labelled]):
        super().__init__()
        self._captured, self._call, self._labelling = captured, call, labelling
        self._children = iter(call.children)
        self._alive: list[Any] = []  # ids of tensors are keys
        self._entered = call  # the child that ran last
        self.known = known

    def create_args_for_root(self, root_fn, is_module, concrete_args=None):
        # fx looks the forward up on the class; the instance may have one that was rewritten before.
        root_fn = own_forward(self.root)
        # The signature as it is, so that callers of the rewritten forward see no difference.
        signature = inspect.signature(root_fn)
        bound = signature.bind(self.root, *self._call.args, **self._call.kwargs)
        bound.apply_defaults()
        by_place: list[Any] = [self.root]
        by_name: dict[str, Any] = {}
        for name, parameter in list(signature.parameters.items())[1:]:
            given = self._placeholder(parameter, bound.arguments[name])
            if parameter.kind is parameter.VAR_POSITIONAL:
                by_place.extend(given)
            elif parameter.kind is parameter.VAR_KEYWORD:
                by_name.update(given)
            elif parameter.kind is parameter.KEYWORD_ONLY:
                by_name[name] = given
            else:
                by_place.append(given)
        return functools.partial(root_fn, **by_name), by_place

    def _placeholder(self, parameter: inspect.Parameter, value: Any) -> Any:
        stars = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
        default = () if parameter.default is parameter.empty else (parameter.default,)
        node = self.create_node("placeholder", f"{stars}{parameter.name}", default, {})
        node.meta["val"] = value
        return self._argument(self.proxy(node))

    def _argument(self, proxy: _Valued) -> Any:
        """A tensor or number as a proxy, a container as a container of proxies, anything else as it is."""
        value = proxy.value
        if type(value) in (list, tuple):
            return type(value)(self._argument(proxy[index]) for index in range(len(value)))
        if type(value) is dict:
            return {key: self._argument(proxy[key]) for key in value}
        return proxy if isinstance(value, Tensor) or type(value) in (int, float) else self.concrete(proxy)

    def concrete(self, proxy: _Valued) -> Any:
        """The value of a proxy, with a guard in the graph that it is the same whenever this runs."""
        if isinstance(proxy.value, Tensor):
            raise TraceError("its control flow depends on the values of a tensor")
        if isinstance(proxy.value, (bool, int, float, str, type(None))):
            self.create_node("call_function", guard, (proxy.node, proxy.value), {}).meta["val"] = None
        return proxy.value

    def proxy(self, node: fx.Node) -> _Valued:
        return _Valued(node, self)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True

    def create_arg(self, a: Any) -> Any:
        # Asked by type, for isinstance would take a proxy for what it stands for.
        if type(a) is _Valued:
            return a.node
        if type(a) is AskedMode:
            return bool(a)
        if isinstance(a, Tensor) and not isinstance(a, nn.Parameter):
            return self._plain_tensor(a)
        return super().create_arg(a)

    def _plain_tensor(self, tensor: Tensor) -> fx.Node:
        """A tensor that is a module's attribute; one made on the way would be lost (fx leaves it on the module)."""
        name = next((name for value, name in self.tensor_attrs.items() if value is tensor), None)
        if name is None:
            raise TraceError("it computes with a tensor that torch.fx has not seen come into being")
        node = self.create_node("get_attr", name, (), {})
        node.meta["val"] = self._captured.tensors.get(f"{self._call.path}.{name}".lstrip("."))
        if node.meta["val"] is None:
            node.meta["val"] = self._captured.mode.from_tensor(tensor)
        return node

    def create_proxy(self, kind, target, args, kwargs, *rest, **options):
        with _functions_recorded(None):
            proxy = super().create_proxy(kind, target, args, kwargs, *rest, **options)
            self._follow(proxy.node)
        return proxy

    def _follow(self, node: fx.Node) -> None:
        """Note a new node's value, the ATen ops it ran and the labels of what they gave."""
        if node.target in AUTOCAST:
            node.meta.update(val=None, ops=[], looks=[])
            return
        log = _OpLog(self._captured.mode)
        with torch.no_grad(), self._captured.mode, log:
            node.meta["val"] = self._evaluate(node)
        node.meta["ops"] = [op for op, *_ in log.calls]
        findings = self._labelling.findings.apart()
        for call in log.calls:
            self._label(*call, findings)
        node.meta["looks"] = findings.looks
        if node.op == "call_module":
            given = fx.node.map_arg((node.args, node.kwargs), lambda other: other.meta["val"])
            self.link(given, (self._entered.args, self._entered.kwargs))

    def _label(self, op: Any, args: Any, kwargs: Any, out: Any, findings: Findings) -> None:
        tensors = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        if not tensors:
            return
        self._alive.append(out)
        args, kwargs = tree_map_only(Tensor, self._labels_of, (args, kwargs))
        labels = self._labelling.apply(op, args, kwargs, out, self._call.path, findings)
        found = [label for label in (labels if isinstance(labels, list) else [labels]) if label is not None]
        self.known.update({id(tensor): label for tensor, label in zip(tensors, found, strict=True)})

    def _labels_of(self, value: Tensor) -> Labelled:
        return self.known.get(id(value)) or Labelled(tuple(value.shape))

    def link(self, traced: Any, captured: Any) -> None:
        """Merge the labels of what was traced and of what was captured at the same place.

        They are the same but where an op made channels of its own (padding, zeros to concatenate): there the
        traced op made other ones than the captured op, which the rest of the model is coupled with.
        """
        ours, theirs = tree_leaves(traced), tree_leaves(captured)
        if len(ours) != len(theirs):
            return  # only train mode returns as many
        for a, b in zip(ours, theirs, strict=True):
            if isinstance(a, Tensor) and isinstance(b, Tensor) and a.shape == b.shape and a is not b:
                labelling = self._labelling
                pair = [self._labels_of(a), self._labels_of(b)]
                shapes = [tuple(a.shape)]
                call = OpCall("forward", (), {}, shapes, self._call.path, labelling.space, labelling.findings)
                meet(call, pair)

    def _evaluate(self, node: fx.Node) -> Any:
        if node.op == "get_attr":
            name = f"{self._call.path}.{node.target}".lstrip(".")
            if name not in self._captured.tensors:
                raise TraceError(f"it reads {node.target}, which is no parameter or buffer")
            return self._captured.tensors[name]
        if node.op == "call_module":
            path = f"{self._call.path}.{node.target}".lstrip(".")
            child = next(self._children, None)
            if child is None or path not in child.names:
                raise TraceError(f"traced, it calls {path} where it ran {child.path if child else 'nothing'}")
            self._entered = child
            return child.output
        return run_call(node.op, node.target, node.args, node.kwargs, lambda other: other.meta["val"])


_recording: _Tracer | None = None
"""The tracer that records calls of torch's builtin functions, if one does."""


@contextlib.contextmanager
def _functions_recorded(by: _Tracer | None) -> Iterator[None]:
    global _recording
    before, _recording = _recording, by
    try:
        yield
    finally:
        _recording = before


@contextlib.contextmanager
def _functions_wrapped(tracer: _Tracer) -> Iterator[None]:
    """While a forward runs, torch's builtin functions are recorded by their arguments as they are.

    Left to themselves they look into sizes given as proxies (which would guard them) before they ask the
    proxies for leave, and don't ask at all where there is no tensor among their arguments (torch.zeros).
    """
    for space in (torch, F):
        vars(space).update(_recorders(space))
    try:
        with _functions_recorded(tracer):
            yield
    finally:
        for space in (torch, F):
            vars(space).update(_builtins(space))


@functools.cache
def _recorders(space: types.ModuleType) -> dict[str, Callable[..., Any]]:
    return {name: functools.partial(_record, name, plain) for name, plain in _builtins(space).items()}


def _record(name: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if _recording is not None and (
        name in _FACTORIES or any(type(leaf) is _Valued for leaf in tree_leaves((args, kwargs)))
    ):
        return _recording.create_proxy("call_function", function, args, kwargs)
    return function(*args, **kwargs)


AUTOCAST = (torch.amp._enter_autocast, torch.amp._exit_autocast)
"""Calls that stand in a graph where the forward enters and leaves torch.autocast; they are not run on fake values."""


@contextlib.contextmanager
def _contexts_followed() -> Iterator[None]:
    """Records where a forward enters and leaves torch.autocast; torch.fx would forget it.

    What it records without gradients it would record with them, so that is refused.
    """
    plain_init, plain_enter, plain_exit = (vars(torch.autocast)[name] for name in ("__init__", "__enter__", "__exit__"))
    plain_set_grad = torch._C._set_grad_enabled

    def init(context: Any, device_type: Any, *args: Any, **kwargs: Any) -> None:
        of_value = type(device_type) is _Valued
        plain_init(context, device_type.value if of_value else device_type, *args, **kwargs)
        context.device = device_type

    def enter(context: Any) -> Any:
        if _recording is None:
            return plain_enter(context)
        given = (context.device, context.fast_dtype, context._enabled, context._cache_enabled)
        context._recorded = _recording.create_proxy("call_function", torch.amp._enter_autocast, given, {})
        return context

    def leave(context: Any, *error: Any) -> Any:
        if _recording is None:
            return plain_exit(context, *error)
        return _recording.create_proxy("call_function", torch.amp._exit_autocast, (context._recorded,), {}) and None

    def set_grad(mode: bool) -> None:
        if _recording is not None:
            raise TraceError("it changes whether gradients are recorded")
        plain_set_grad(mode)

    with (
        mock.patch.multiple(torch.autocast, __init__=init, __enter__=enter, __exit__=leave),
        mock.patch.object(torch._C, "_set_grad_enabled", set_grad),
    ):
        yield


def run_call(op: str, target: Any, args: Any, kwargs: Any, value_of: Callable[[fx.Node], Any]) -> Any:
    """Run a call_function or call_method with `value_of` each node among its arguments."""
    args, kwargs = fx.node.map_arg((args, kwargs), value_of)
    return getattr(args[0], target)(*args[1:], **kwargs) if op == "call_method" else target(*args, **kwargs)


@contextlib.contextmanager
def _followed() -> Iterator[None]:
    """Looks into functions that were declared leaves (`torch.fx.wrap`), as proxies that know their values can."""
    with mock.patch.dict(_symbolic_trace._wrapped_fns_to_patch, clear=True), _contexts_followed():
        yield


def trace(module: nn.Module, call: ModuleCall, captured: Capture, labelling: Labelling,
          known: Mapping[int, Labelled]) -> tuple[fx.Graph, dict[int, Labelled]]:  # fmt: skip
    """Trace `module`'s forward as it ran in `call`.

    Returns:
        The graph (each node's meta has `val`, its value, `ops`, the ATen ops it ran, and `looks`, the
        statistics that these take along channels) and the labels of all tensors in it by id.

    Raises:
        TraceError: torch.fx cannot follow the forward; the message says why.
    """
    tracer = _Tracer(captured, call, labelling, dict(known))
    try:
        with attributes_preserved([module]), _functions_wrapped(tracer), _followed():
            graph = tracer.trace(module)
    except TraceError as error:
        raise TraceError(error.cause, where=call.path) from error
    except Exception as error:  # whatever user code does with a proxy that fx does not foresee
        raise TraceError(f"torch.fx cannot follow it ({error})", where=call.path) from error
    returned = next(node for node in graph.nodes if node.op == "output").args[0]
    tracer.link(fx.node.map_arg(returned, lambda node: node.meta["val"]), call.output)
    graph._autogate_tracer = tracer  # keeps the tensors alive whose ids are the keys
    return graph, tracer.known
