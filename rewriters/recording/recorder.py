"""Write a graph of the ATen calls that a forward makes on fake tensors, and the tree of its module calls.

`Recorder` is a dispatch mode: it sees every ATen call. `record_module_calls` patches `nn.Module.__call__` and notes
which module each of them belongs to, what every module was called with and what it returned. Slimming rewrites single
modules, so it has to know that.

`make_fx` and `torch.export` do the same and more (symbolic shapes, functionalisation, decompositions). A bare dispatch
mode does what is needed here in a fraction of their time. The graph doesn't have to be functional: merging labels is
symmetric, so an in-place op on a view merges the labels of the tensor that it is a view of.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any
from unittest import mock

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from rewriters.recording.answered_calls import AnsweredCalls
from rewriters.recording.meta_kernels import constant, has_real, run_on_fakes
from rewriters.recording.module_calls import ModuleCall
from rewriters.recording.module_walk import tensor_slots
from rewriters.recording.opaque import Opaque, RecordedOutputs, opaque_call
from rewriters.recording.pytrees import held_tensors, maker_of, plain_kind, tensors_of


class Recorder(TorchDispatchMode):
    """Writes every ATen call into a graph; tensors it hasn't seen become constants (`get_attr`) with known values.

    Parameters, buffers and tensors that are plain attributes have values, which a forward may ask for (a detector's
    strides). Inputs have none.

    Args:
        mode: of the fake tensors.
        real: the model's own tensors, by the ids of the fake ones that stand for them.
        run: runs a call on fake tensors.
    """

    def __init__(
        self, mode: FakeTensorMode, real: Mapping[int, Tensor], names: Mapping[int, str],
        run: Callable[..., Any] = run_on_fakes,
    ):  # fmt: skip
        super().__init__()
        self._mode, self._run = mode, run
        self.graph = fx.Graph()
        self.nodes: dict[int, fx.Node] = {}
        self.call: ModuleCall | None = None
        self.roots: list[ModuleCall] = []
        self.exchanged: list[str] = []
        self.failed: list[ModuleCall] = []
        self.written: set[str] = set()
        self.answered: dict[fx.Node, ModuleCall] = {}
        self._error: Exception | None = None
        self._real = real
        self._names = names
        self._constants: dict[int, Tensor] = {}
        self._alive: list[Tensor] = []
        self._reserves: dict[Any, Tensor] = {}

    def began_with(self, tensor: Tensor) -> bool:
        """Whether the tensor is a parameter or buffer that the model had before it ran."""
        return id(tensor) in self._real

    def note_failure(self, error: Exception) -> None:
        """Note that the running call failed: `failed` holds all calls that the error came through, innermost first."""
        if self._error not in (error, error.__context__):
            self.failed = []  # the error before was caught
        self._error = error
        self.failed += [self.call] if self.call is not None else []

    def note_mode_read(self) -> None:
        """Note that the running call's code asks for its mode."""
        if self.call is not None:
            self.call.asks_mode = True

    def note_write(self, path: str) -> None:
        """Note that code sets an attribute on the module at `path`, if that isn't the running call's module."""
        if self.call is not None and path != self.call.path:
            self.written.add(path)

    def add_input(self, name: str, value: Tensor) -> fx.Node:
        node = self.graph.placeholder(name)
        self.own(node, value)
        return node

    def add_held_input(self, tensor: Tensor, fake: Tensor) -> None:
        """Note an input in a field of an object: the forward gets the tensor itself, which the fake one stands for."""
        self.add_input("input", fake)
        self._constants[id(tensor)] = fake
        self._alive.append(tensor)

    def own(self, node: fx.Node, value: Any) -> None:
        node.meta["val"] = value
        node.meta["call"] = self.call
        if isinstance(value, Tensor):
            self.nodes[id(value)] = node
            self._alive.append(value)  # an id must not be reused

    def node_of(self, value: Tensor) -> fx.Node:
        if id(value) not in self.nodes:
            with self.graph.inserting_before(next(iter(self.graph.nodes))):
                name = self._names.get(id(value), f"constant_{len(self.nodes)}")
                self.own(self.graph.create_node("get_attr", name, name="tensor"), value)
        return self.nodes[id(value)]

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is _EMPTY and tuple(args[0]) == (0,) and kwargs.get("dtype") is torch.uint8:
            return self._reserve(func, args, kwargs)
        if has_real(args):
            args = tree_map_only(Tensor, self._known, args)
        if func is torch.ops.aten._local_scalar_dense.default and id(args[0]) in self._real:
            with unset_fake_temporarily():
                return self._real[id(args[0])].item()  # a parameter's or buffer's own value is known
        if func is torch.ops.aten.convolution.default and args[0].dtype != args[1].dtype:
            # A fake convolution would accept it.
            raise TypeError(f"the input is {args[0].dtype} and the kernel {args[1].dtype}")
        restrides = only_restrides(func, args)
        if reshapes_in_place(func) and not restrides:
            self._keep_as_it_is(args[0])
        out = self._one_draw(kwargs) if _draws_one(func, args) else self._run(self._mode, func, args, kwargs)
        if restrides or not tensors_of(out):
            return out  # not a step of the forward, or a query of a tensor's device or layout
        self._write(func, args, kwargs, out)
        return out

    def _one_draw(self, options: Mapping[str, Any]) -> Tensor:
        """A number from [0, 1) whose value is known: a forward asks for it, to leave out a layer now and then."""
        with unset_fake_temporarily():
            drawn = torch.full((), 0.5, dtype=options.get("dtype"), device="cpu")
        return constant(self._mode, drawn)

    def _reserve(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """The tensor without elements that each batch norm makes for its backward: no step of the forward."""
        device = kwargs.get("device")
        if device not in self._reserves:
            self._reserves[device] = run_on_fakes(self._mode, func, args, kwargs)
        return self._reserves[device]

    def _known(self, tensor: Tensor) -> Tensor:
        """The fake tensor for one of a call's arguments."""
        if isinstance(tensor, FakeTensor):
            return tensor
        if id(tensor) not in self._constants:
            self._constants[id(tensor)] = constant(self._mode, tensor)
            self._alive.append(tensor)
        return self._constants[id(tensor)]

    def _keep_as_it_is(self, value: Tensor) -> None:
        """Replace a tensor in what is recorded by an alias, because its own shape is about to change in place."""
        before = run_on_fakes(self._mode, torch.ops.aten.alias.default, (value,), {})
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
        """Write the call of an opaque module, which returns the tensors in `output`."""
        given, own = ([*{id(tensor): tensor for tensor in tensors}.values()] for tensors in (given, own))
        self._write(opaque_call, (reason, given, own), {}, tuple(tensors_of(output)))

    def answer(self, answers: AnsweredCalls, call: ModuleCall) -> bool:
        """Answer a call from an earlier recording, as one node, if that can be done."""
        earlier = answers.next(call, self.written)
        if earlier is None:
            return False
        given = {id(tensor): tensor for tensor in tensors_of((call.args, call.kwargs))}
        node = self._write(opaque_call, ("known", [*given.values()], []), {}, tuple(tensors_of(call.output)))
        self.answered[node] = earlier
        return True

    def _write(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> fx.Node:
        node_args, node_kwargs = fx.node.map_aggregate(
            (args, kwargs), lambda value: self.node_of(value) if isinstance(value, Tensor) else value
        )
        node = self._node(func, node_args, node_kwargs)
        self.own(node, out)
        if isinstance(out, (tuple, list)):
            for index, item in enumerate(out[:1] if func is _BATCH_NORM else out):
                if isinstance(item, Tensor):
                    self.own(self._node(_getitem, (node, index)), item)
        if self.call is not None:
            self.call.nodes.append(node)
        return node

    def _node(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> fx.Node:
        """As `graph.call_function`, which takes twice as long: it makes a name, and looks for symbols in arguments."""
        node = self.graph.create_node("call_function", func, name=_name_for(func))
        node.args = args
        if kwargs:
            node.kwargs = kwargs
        return node


_EMPTY = torch.ops.aten.empty.memory_format
_BATCH_NORM = torch.ops.aten.native_batch_norm.default
"""A forward sees the first of its results alone."""


@functools.cache
def _name_for(func: Any) -> str:
    return str(func.__name__).strip("_").replace(".", "_")


def _draws_one(op: Any, args: tuple[Any, ...]) -> bool:
    """Whether a call is `torch.rand(())`."""
    return op is torch.ops.aten.rand.default and len(args[0]) == 0


@functools.cache  # tags are slow to read
def reshapes_in_place(op: Any) -> bool:
    """Whether a call changes the shape of its tensor in place, as `unsqueeze_` does."""
    return torch.Tag.inplace_view in op.tags and op is not torch.ops.aten.detach_.default


def only_restrides(op: Any, args: tuple[Any, ...]) -> bool:
    """Whether a call only changes the strides of dimensions of size 1, so that no element moves.

    Pooling a channels_last tensor to one pixel ends with such a call. Ask before the call, which is in place.
    """
    if op is not torch.ops.aten.as_strided_.default or len(args) > 3:
        return False
    tensor, size, stride = args
    along = zip(tensor.shape, tensor.stride(), stride, strict=False)
    return tuple(size) == tuple(tensor.shape) and all(length == 1 or old == new for length, old, new in along)


def _getitem(values: Any, index: int) -> Any:
    return values[index]


def is_getitem(node: fx.Node) -> bool:
    """Whether the node only picks one result of a call that has several."""
    return node.target is _getitem


@contextlib.contextmanager
def record_module_calls(
    recorder: Recorder, names: Mapping[nn.Module, list[str]], opaque: Mapping[str, Opaque], replies: RecordedOutputs,
    answers: AnsweredCalls | None = None,
) -> Iterator[None]:  # fmt: skip
    plain_call = nn.Module.__call__
    inside = {path: [module for module, own in names.items() if own[0] in opaque[path].inside] for path in opaque}

    def reply(call: ModuleCall) -> Any:
        output = replies.next(call.path, call.args, call.kwargs)
        own = (tensor for module in inside[call.path] for tensor in (*module.parameters(), *module.buffers()))
        recorder.write_opaque(opaque[call.path].reason, held_tensors((call.args, call.kwargs)), own, output)
        return output

    def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if module not in names:
            return plain_call(module, *args, **kwargs)
        outer = recorder.call
        inner = ModuleCall(tuple(names[module]), _copy_containers(args), _copy_containers(kwargs))
        (outer.children if outer else recorder.roots).append(inner)
        if answers is not None and outer is not None and outer is recorder.roots[0] and recorder.answer(answers, inner):
            return inner.output
        recorder.call = inner
        try:
            if inner.path not in opaque and isinstance(module, torch.jit.ScriptModule):
                raise TypeError("torch.jit has compiled it, and compiled code can't be rewritten")
            output = reply(inner) if inner.path in opaque else plain_call(module, *args, **kwargs)
            inner.output = _copy_containers(output)
        except Exception as error:
            recorder.note_failure(error)
            raise
        finally:
            recorder.call = outer
        if outer is None:
            recorder.exchanged = [
                name for name, owner, own_name, tensor in tensor_slots(module)
                if not recorder.began_with(tensor) and own_name in owner._buffers
            ]  # fmt: skip
        return output

    with mock.patch.object(nn.Module, "__call__", call):
        yield


def _copy_containers(values: Any) -> Any:
    """The same values in copied containers, which later changes to the forward's own containers don't reach."""
    kind = plain_kind(values)
    if kind is None:
        return values
    entries = values.values() if kind is dict else values
    copied: Any = [*map(_copy_containers, entries)]
    copied = dict(zip(values, copied, strict=True)) if kind is dict else kind(copied)
    return copied if type(values) is kind else maker_of(values)(copied)
