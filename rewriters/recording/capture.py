"""Record a model's forward as a torch.fx graph of ATen calls, without computing anything.

The forward runs once on fake tensors (shapes without data), under a dispatch mode that writes down every
ATen call it sees. Beside the graph the tree of module calls is kept: slimming rewrites single modules and
has to know what each of them was called with and what its children gave back.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from rewriters.errors import AutogateError, CaptureError
from rewriters.recording.error_messages import explain, why_unrecordable
from rewriters.recording.meta_kernels import constant, has_real, on_fakes, stand_in
from rewriters.recording.opaque import (
    FailsForRealError,
    Opaque,
    RealCall,
    Replies,
    as_they_ran,
    opaque_call,
    run_for_real,
    smallest,
    tensors_in,
)
from rewriters.recording.pytrees import tensors_of
from rewriters.recording.side_effects import attributes_preserved, random_numbers_kept


@dataclass(eq=False)
class ModuleCall:
    """One call of one module: what went in, what came out, and the calls and ATen nodes inside it.

    `names` are all that the module has in the model, the first of them `path`.
    """

    names: tuple[str, ...]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any = None
    children: list[ModuleCall] = field(default_factory=list)
    nodes: list[fx.Node] = field(default_factory=list)

    @property
    def path(self) -> str:
        return self.names[0]

    def walk(self) -> Iterator[ModuleCall]:
        yield self
        for child in self.children:
            yield from child.walk()


@dataclass(frozen=True)
class Capture:
    """A recorded forward.

    Attributes:
        graph: ATen calls; a node's meta holds `val` (fake tensor or tuple of them) and `call`, the
            `ModuleCall` it ran in. `get_attr` nodes are named as `model.get_parameter` names them.
        root: the outermost module call.
        nodes: the node that made each fake tensor, by the tensor's id (the tensors live in the graph).
        tensors: fake tensors of parameters and buffers, by qualified name.
        mode: the fake tensor mode everything here belongs to.
        exchanged: buffers in whose place the forward has put others.
        opaque: modules that couldn't be recorded, by path; each of their calls is one node, an `opaque_call`.
    """

    graph: fx.Graph
    root: ModuleCall
    nodes: Mapping[int, fx.Node]
    tensors: Mapping[str, Tensor]
    mode: FakeTensorMode
    exchanged: tuple[str, ...] = ()
    opaque: Mapping[str, Opaque] = field(default_factory=dict)

    def calls(self) -> Iterator[ModuleCall]:
        return self.root.walk()


class Recorder(TorchDispatchMode):
    """Writes every ATen call into a graph; tensors it has not seen become constants (`get_attr`) with known values."""

    def __init__(self, mode: FakeTensorMode, real: Mapping[int, Tensor]):
        super().__init__()
        self._mode = mode
        self.graph = fx.Graph()
        self.nodes: dict[int, fx.Node] = {}
        self.call: ModuleCall | None = None
        self.roots: list[ModuleCall] = []
        self.exchanged: list[str] = []
        self.failed: list[ModuleCall] = []
        self._error: Exception | None = None
        self._real = real
        self._constants: dict[int, Tensor] = {}
        self._alive: list[Tensor] = []

    def began_with(self, tensor: Tensor) -> bool:
        """Whether it is a parameter or buffer that the model had before it ran."""
        return id(tensor) in self._real

    def note_failure(self, error: Exception) -> None:
        """Note that the call that runs failed: `failed` are all that an error passed through, the innermost first."""
        if self._error not in (error, error.__context__):
            self.failed = []  # the former error was caught
        self._error = error
        self.failed += [self.call] if self.call is not None else []

    def add_input(self, name: str, value: Tensor) -> fx.Node:
        node = self.graph.placeholder(name)
        self._own(node, value)
        return node

    def _own(self, node: fx.Node, value: Any) -> None:
        node.meta["val"] = value
        node.meta["call"] = self.call
        if isinstance(value, Tensor):
            self.nodes[id(value)] = node
            self._alive.append(value)  # an id must not be given away twice

    def node_of(self, value: Tensor) -> fx.Node:
        if id(value) not in self.nodes:
            with self.graph.inserting_before(next(iter(self.graph.nodes))):
                self._own(self.graph.create_node("get_attr", f"constant_{len(self.nodes)}"), value)
        return self.nodes[id(value)]

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if has_real(args):
            args = tree_map_only(Tensor, self._known, args)
        if func is torch.ops.aten._local_scalar_dense.default and id(args[0]) in self._real:
            with unset_fake_temporarily():
                return self._real[id(args[0])].item()  # a parameter's or buffer's own value is known
        if func is torch.ops.aten.convolution.default and args[0].dtype != args[1].dtype:
            # A fake convolution would let it pass.
            raise TypeError(f"the input is {args[0].dtype} and the kernel {args[1].dtype}")
        restrides = only_restrides(func, args)
        if reshapes_in_place(func) and not restrides:
            self._keep_as_it_is(args[0])
        out = on_fakes(self._mode, func, args, kwargs)
        if restrides or not tensors_of(out):
            return out  # not a step of the forward, or a question about a tensor (its device, its layout)
        self._write(func, args, kwargs, out)
        return out

    def _known(self, tensor: Tensor) -> Tensor:
        """The fake tensor for one of a call's arguments."""
        if isinstance(tensor, FakeTensor):
            return tensor
        if id(tensor) not in self._constants:
            self._constants[id(tensor)] = constant(self._mode, tensor)
            self._alive.append(tensor)
        return self._constants[id(tensor)]

    def _keep_as_it_is(self, value: Tensor) -> None:
        """Let another tensor stand for it in what is recorded: its own shape changes now."""
        before = on_fakes(self._mode, torch.ops.aten.alias.default, (value,), {})
        self.nodes[id(before)] = self.node_of(value)
        self._alive.append(before)
        for node in self.graph.nodes:
            if node.meta["val"] is value:
                node.meta["val"] = before
        for call in (call for root in self.roots for call in root.walk()):
            call.args, call.kwargs, call.output = tree_map_only(
                Tensor, lambda tensor: before if tensor is value else tensor, (call.args, call.kwargs, call.output)
            )

    def write_opaque(self, reason: str, given: Iterable[Tensor], own: Iterable[Tensor], output: Any) -> None:
        """Write the call of an opaque module, which gives the tensors in `output`."""
        given, own = ([*{id(tensor): tensor for tensor in tensors}.values()] for tensors in (given, own))
        self._write(opaque_call, (reason, given, own), {}, tuple(tensors_of(output)))

    def _write(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Any) -> None:
        node_args, node_kwargs = fx.node.map_aggregate(
            (args, kwargs), lambda value: self.node_of(value) if isinstance(value, Tensor) else value
        )
        node = self.graph.call_function(func, node_args, node_kwargs)
        self._own(node, out)
        if isinstance(out, (tuple, list)):
            for index, item in enumerate(out):
                if isinstance(item, Tensor):
                    self._own(self.graph.call_function(_getitem, (node, index)), item)
        if self.call is not None:
            self.call.nodes.append(node)


@functools.cache  # tags are slow to read
def reshapes_in_place(op: Any) -> bool:
    """Whether a call gives the tensor that it is given another shape: `unsqueeze_`, say."""
    return torch.Tag.inplace_view in op.tags and op is not torch.ops.aten.detach_.default


def only_restrides(op: Any, args: tuple[Any, ...]) -> bool:
    """Whether a call writes down other strides for dimensions of size 1, and leaves every element in its place.

    Pooling a channels_last tensor to one pixel ends with it. To be asked before the call, which is in place.
    """
    if op is not torch.ops.aten.as_strided_.default or len(args) > 3:
        return False
    tensor, size, stride = args
    along = zip(tensor.shape, tensor.stride(), stride, strict=False)
    return tuple(size) == tuple(tensor.shape) and all(length == 1 or old == new for length, old, new in along)


def _getitem(values: Any, index: int) -> Any:
    return values[index]


def is_getitem(node: fx.Node) -> bool:
    """Whether the node only picks one of the results of a call with several."""
    return node.target is _getitem


@contextlib.contextmanager
def _module_calls(
    recorder: Recorder, names: Mapping[nn.Module, list[str]], opaque: Mapping[str, Opaque], replies: Replies
) -> Iterator[None]:
    plain_call = nn.Module.__call__
    inside = {path: [module for module, own in names.items() if own[0] in opaque[path].inside] for path in opaque}

    def reply(call: ModuleCall) -> Any:
        output = replies.next(call.path, call.args, call.kwargs)
        own = (tensor for module in inside[call.path] for tensor in (*module.parameters(), *module.buffers()))
        recorder.write_opaque(opaque[call.path].reason, tensors_in(call.args, call.kwargs), own, output)
        return output

    def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if module not in names:
            return plain_call(module, *args, **kwargs)
        outer = recorder.call
        inner = ModuleCall(tuple(names[module]), _as_they_are(args), _as_they_are(kwargs))
        (outer.children if outer else recorder.roots).append(inner)
        recorder.call = inner
        try:
            if inner.path not in opaque and isinstance(module, torch.jit.ScriptModule):
                raise TypeError("torch.jit has compiled it, which can't be changed any more")
            output = reply(inner) if inner.path in opaque else plain_call(module, *args, **kwargs)
            inner.output = _as_they_are(output)
        except Exception as error:
            recorder.note_failure(error)
            raise
        finally:
            recorder.call = outer
        if outer is None:
            recorder.exchanged = [name for name, buffer in module.named_buffers() if not recorder.began_with(buffer)]
        return output

    with mock.patch.object(nn.Module, "__call__", call):
        yield


def _as_they_are(values: Any) -> Any:
    """The same values in containers of their own: what is put into those later, or taken out, makes no difference."""
    if type(values) in (list, tuple):
        return type(values)(map(_as_they_are, values))
    if type(values) is dict:
        return {key: _as_they_are(value) for key, value in values.items()}
    return values


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by qualified name; a shared one once, under its first name."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def in_every_place(model: nn.Module, real: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """One of the others for every place that a parameter or buffer stands in, each place once, for functional_call.

    Left to tie them itself, functional_call exchanges the tensors of a module that has two names twice, and the
    second time takes the others for what has to be put back.
    """
    other = {id(tensor): others[name] for name, tensor in real.items()}
    return {
        f"{path}.{name}".lstrip("."): other[id(tensor)]
        for path, module in model.named_modules()
        for name, tensor in (*module._parameters.items(), *module._buffers.items())
        if tensor is not None
    }


@contextlib.contextmanager
def _without_fast_paths() -> Iterator[None]:
    """Attention in its parts, not as one fused kernel that hides them."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


class _Unrecordable(Exception):
    """A recording that failed: the error to raise if nothing can be done, and what may be.

    Args:
        error: for the caller.
        reason: why a module of these would be opaque.
        paths: of the modules whose calls failed, the innermost first.
    """

    def __init__(self, error: CaptureError, reason: str, paths: list[str]):
        super().__init__(reason)
        self.error, self.reason, self.paths = error, reason, paths


def capture(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None = None,
    opaque: Mapping[str, Opaque] | None = None,
) -> Capture:  # fmt: skip
    """Record `model(*args, **kwargs)` in the mode (train or eval) that the model is in.

    Nothing is computed and nothing in the model changes: parameters, buffers and inputs are replaced by
    fake tensors for the time of the call. Only where a module inside can't be recorded the model runs for real, once;
    what it does to buffers and random numbers is taken back, and the module is opaque.

    Args:
        model: any module.
        args: example inputs by position.
        kwargs: example inputs by name.
        opaque: modules that couldn't be recorded before. Nothing is run for real then: they are all there are.

    Raises:
        CaptureError: the forward fails, or its own control flow depends on a tensor's values; the message names
            the module and the line.
    """
    known, run = dict(opaque or {}), None
    while True:
        try:
            return _record(model, args, kwargs or {}, known)
        except _Unrecordable as failure:
            if opaque is None and run is None and any(failure.paths):
                run = _run_for_real(model, args, kwargs or {}, failure)
            path = None if run is None else smallest(failure.paths, run, known)
            if run is None or path is None:
                raise failure.error from failure.__cause__
            known = as_they_ran(run, {path: failure.reason, **{old: one.reason for old, one in known.items()}})


def _run_for_real(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], failure: _Unrecordable
) -> RealCall | None:
    """The calls when the model ran for real, after a recording that failed; None where inputs have no values.

    Raises:
        CaptureError: it fails for real too. Where that is in the module that the recording failed in, it is the
            recording's error.
    """
    real = named_tensors(model)
    try:
        with _without_fast_paths():
            return run_for_real(model, in_every_place(model, real, real), args, kwargs, _names(model))
    except FailsForRealError as failed:
        error = failed.__cause__
        if failed.path in failure.paths[:1] or not isinstance(error, Exception):
            raise failure.error from failure.__cause__
        raise explain(error, failed.path) from error


def _names(model: nn.Module) -> dict[nn.Module, list[str]]:
    """All names of each module."""
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
    return names


def _record(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], opaque: Mapping[str, Opaque]
) -> Capture:
    """Record a forward in which some modules are opaque (raises `_Unrecordable`)."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    real = named_tensors(model)
    fakes = {name: stand_in(mode, tensor) for name, tensor in real.items()}
    recorder = Recorder(mode, {id(fakes[name]): tensor for name, tensor in real.items()})
    fake_args, fake_kwargs = tree_map_only(Tensor, mode.from_tensor, (tuple(args), dict(kwargs)))
    tree_map_only(Tensor, lambda x: recorder.add_input("input", x), (fake_args, fake_kwargs))
    for name, fake in fakes.items():
        recorder._own(recorder.graph.create_node("get_attr", name), fake)
    names = _names(model)
    replies = Replies(opaque, lambda noted: noted.fake(mode))
    try:
        with (
            attributes_preserved(names),
            random_numbers_kept(),
            _without_fast_paths(),
            torch.no_grad(),
            mode,
            _module_calls(recorder, names, opaque, replies),
            recorder,
        ):
            output = functional_call(
                model, in_every_place(model, real, fakes), fake_args, fake_kwargs, tie_weights=False
            )
    except AutogateError:
        raise
    except Exception as error:
        paths = [call.path for call in recorder.failed]
        raise _Unrecordable(explain(error, paths[0] if paths else ""), why_unrecordable(error), paths) from error
    recorder.graph.output(tree_map_only(Tensor, recorder.node_of, output))
    return Capture(recorder.graph, recorder.roots[0], recorder.nodes, fakes, mode, tuple(recorder.exchanged), opaque)
