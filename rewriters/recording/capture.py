"""Capture a model's forward as a torch.fx graph of ATen calls, without computing anything.

The forward runs once on fake tensors (shapes without data), under the dispatch mode of `recorder.py`. The result holds
the graph and the tree of module calls.

Where that fails, it may be a fault of fake tensors: the forward is recorded once more with the layouts of real results
(`real_results.py`). Where that fails too, in a module inside the model (on a value that the forward asks for, say), the
model runs for real, once (`opaque.py`), which gives the shapes of what each module is called with and returns. The
innermost module that failed, or the next one outwards whose outputs are tensors, becomes opaque: the forward is
recorded again, and that module's call is one node, an `opaque_call`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Set
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.func import functional_call
from torch.nn.modules import transformer

from rewriters.errors import AutogateError, CaptureError
from rewriters.interrupts import let_signals_in
from rewriters.recording.answered_calls import AnsweredCalls
from rewriters.recording.error_messages import explain, why_unrecordable
from rewriters.recording.function_calls import FunctionCalls
from rewriters.recording.meta_kernels import fakify, run_on_fakes
from rewriters.recording.mode_reads import attribute_writes, mode_reads
from rewriters.recording.module_calls import ModuleCall
from rewriters.recording.module_walk import named_modules, named_tensors, tensor_slots
from rewriters.recording.opaque import (
    FailsForRealError,
    Opaque,
    RealCall,
    RecordedOutputs,
    TensorSpec,
    innermost_opaque,
    opaque_modules,
    run_for_real,
)
from rewriters.recording.pytrees import held_tensors, map_tensors, tensors_of
from rewriters.recording.real_results import may_be_a_fault_of_fakes, run_with_real_layout
from rewriters.recording.recorder import Recorder, record_module_calls
from rewriters.recording.side_effects import attributes_preserved, generators_kept


class Kept(NamedTuple):
    """An attribute of a module whose forward keeps tensors for later calls, and what it was before the first.

    Attributes:
        path: of the module.
        name: of the attribute.
        absent: whether it was missing.
        value: what it was: None, a flag, a number.
    """

    path: str
    name: str
    absent: bool = False
    value: Any = None


@dataclass(frozen=True)
class Capture:
    """A recorded forward.

    Attributes:
        graph: ATen calls; a node's meta holds `val` (fake tensor or tuple of them) and `call`, the `ModuleCall` it ran
            in. `get_attr` nodes are named as `model.get_parameter` names them.
        root: the outermost module call.
        nodes: the node that made each fake tensor, by the tensor's id (the tensors live in the graph).
        tensors: fake tensors of parameters and buffers, by qualified name; a shared one once, under its first name.
        places: the same under every name.
        mode: the fake tensor mode that everything here belongs to.
        exchanged: buffers that the forward replaced by others.
        opaque: modules that can't be recorded, by path; each of their calls is one node, an `opaque_call`.
        written: paths of modules on which the code of another module sets attributes.
        kept: attributes of modules whose forwards keep tensors for later calls where there were none.
        answered: the calls that weren't run, by their node in the graph, each with the earlier call that answered it.
    """

    graph: fx.Graph
    root: ModuleCall
    nodes: Mapping[int, fx.Node]
    tensors: Mapping[str, Tensor]
    places: Mapping[str, Tensor]
    mode: FakeTensorMode
    exchanged: tuple[str, ...] = ()
    opaque: Mapping[str, Opaque] = field(default_factory=dict)
    written: Set[str] = frozenset()
    kept: tuple[Kept, ...] = ()
    answered: Mapping[fx.Node, ModuleCall] = field(default_factory=dict)

    def calls(self) -> Iterator[ModuleCall]:
        return self.root.walk()


def in_every_place(model: nn.Module, real: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Map every name of every parameter and buffer to its replacement in `others`, for `functional_call`.

    If `functional_call` ties the weights itself, it swaps the tensors of a module with two names twice, and the second
    time it takes the replacements for the originals that it has to put back.
    """
    other = {id(tensor): others[name] for name, tensor in real.items()}
    return {name: other[id(tensor)] for name, _, _, tensor in tensor_slots(model)}


def _as_hinted(mask: Tensor | None, is_causal: bool | None = None, size: int | None = None) -> bool:
    return is_causal is True


@contextlib.contextmanager
def without_fast_paths() -> Iterator[None]:
    """Inside, attention runs as its parts, not as one fused kernel that hides them.

    Nor do torch's transformers look into a mask for whether it is causal. A mask does the same without that.
    """
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with mock.patch.object(transformer, "_detect_is_causal_mask", _as_hinted):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


class _Unrecordable(Exception):
    """A recording failed.

    Args:
        error: what to raise if no module can be made opaque.
        reason: why one of the modules would be opaque.
        paths: the modules whose calls failed, innermost first.
        cause: the error that the forward raised.
    """

    def __init__(self, error: CaptureError, reason: str, paths: list[str], cause: Exception):
        super().__init__(reason)
        self.error, self.reason, self.paths, self.cause = error, reason, paths, cause


def capture(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None = None,
    opaque: Mapping[str, Opaque] | None = None, answers: AnsweredCalls | None = None,
    calls: FunctionCalls | None = None,
) -> Capture:  # fmt: skip
    """Record `model(*args, **kwargs)` in the mode (train or eval) that the model is in.

    Nothing is computed and nothing in the model changes: fake tensors replace parameters, buffers and inputs during the
    call. Only if a module inside can't be recorded does the model run for real, once. What that does to buffers and
    random numbers is undone, and the module is opaque.

    Args:
        model: any module.
        args: example inputs by position, with fake tensors for those without values.
        kwargs: example inputs by name.
        opaque: the modules that are opaque in an earlier recording. Nothing runs for real then, and no others are
            added.
        answers: the outputs of the model's children from an earlier recording.
        calls: what some modules' own code calls is noted here too.

    Raises:
        CaptureError: the forward fails, or the model's own control flow depends on a tensor's values. The message
            names the module and the line.
    """
    known, run, run_call = dict(opaque or {}), None, run_on_fakes
    while True:
        let_signals_in()
        try:
            return _record(model, args, kwargs or {}, known, answers, calls, run_call)
        except _Unrecordable as failure:
            if answers is None and run_call is run_on_fakes and may_be_a_fault_of_fakes(failure.cause):
                run_call = run_with_real_layout
                continue
            if opaque is None and run is None and any(failure.paths):
                run = _run_for_real(model, args, kwargs or {}, failure)
            path = None if run is None else innermost_opaque(failure.paths, run, known)
            if run is None or path is None:
                raise failure.error from failure.__cause__
            known = opaque_modules(run, {path: failure.reason, **{old: one.reason for old, one in known.items()}})


def _run_for_real(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], failure: _Unrecordable
) -> RealCall | None:
    """Run the model for real after a failed recording and return its calls; None if inputs have no values.

    Raises:
        CaptureError: the forward fails for real too. If it fails in the same module, this is the recording's error.
    """
    real = named_tensors(model)
    try:
        with without_fast_paths():
            return run_for_real(model, in_every_place(model, real, real), args, kwargs, _names(model))
    except FailsForRealError as failed:
        error = failed.__cause__
        if failed.path in failure.paths[:1] or not isinstance(error, Exception):
            raise failure.error from failure.__cause__
        raise explain(error, failed.path) from error


def _names(model: nn.Module) -> dict[nn.Module, list[str]]:
    """All names of each module."""
    names: dict[nn.Module, list[str]] = {}
    for name, module in named_modules(model, remove_duplicate=False):
        names.setdefault(module, []).append(name)
    return names


def _as_input(mode: FakeTensorMode, tensor: Tensor) -> Tensor:
    if isinstance(tensor, FakeTensor):  # of another recording
        return TensorSpec.of(tensor).fake(mode)
    return mode.from_tensor(tensor)


def _record(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], opaque: Mapping[str, Opaque],
    answers: AnsweredCalls | None, calls: FunctionCalls | None, run_call: Callable[..., Any],
) -> Capture:  # fmt: skip
    """Record a forward in which some modules are opaque; `run_call` runs its ATen calls. Raises `_Unrecordable`."""
    mode = FakeTensorMode(allow_non_fake_inputs=True) if answers is None else answers.mode
    made = {} if answers is None else answers.tensors
    real = named_tensors(model)
    fakes = {name: made[id(tensor)] if id(tensor) in made else fakify(mode, tensor) for name, tensor in real.items()}
    of_name = {id(fakes[name]): name for name in real}
    recorder = Recorder(mode, {id(fakes[name]): tensor for name, tensor in real.items()}, of_name, run_call)
    fake_args, fake_kwargs = map_tensors(partial(_as_input, mode), (tuple(args), dict(kwargs)))
    for fake in tensors_of((fake_args, fake_kwargs)):
        recorder.add_input("input", fake)
    for tensor in held_tensors((fake_args, fake_kwargs)):
        if not isinstance(tensor, FakeTensor):
            recorder.add_held_input(tensor, mode.from_tensor(tensor))
    for name, fake in fakes.items() if answers is None else ():  # a module's own code alone uses few of them
        recorder.own(recorder.graph.create_node("get_attr", name, name="tensor"), fake)
    names = _names(model)
    replies, places = RecordedOutputs(opaque, lambda noted: noted.fake(mode)), in_every_place(model, real, fakes)
    try:
        with (
            attributes_preserved(names) as kept,
            generators_kept(model),
            without_fast_paths(),
            torch.no_grad(),
            mode,
            mode_reads(recorder.note_mode_read),
            attribute_writes(lambda module: recorder.note_write(names.get(module, [""])[0])),
            record_module_calls(recorder, names, opaque, replies, answers),
            recorder,
            contextlib.nullcontext() if calls is None else calls.noted(model, recorder),
        ):
            output = functional_call(model, places, fake_args, fake_kwargs, tie_weights=False)
    except AutogateError:
        raise
    except Exception as error:
        paths = [call.path for call in recorder.failed]
        told = explain(error, paths[0] if paths else "")
        raise _Unrecordable(told, why_unrecordable(error), paths, error) from error
    returned = held_tensors(output)
    if answers is None and not returned:
        raise CaptureError(
            f"no tensors are found in what it returns, of type {type(output).__name__}.",
            where=type(model).__name__,
            remedy="Let it return tensors, or containers or objects that hold them. An iterator can't be looked into.",
        )
    recorder.graph.output(tuple(map(recorder.node_of, returned)))
    return Capture(
        recorder.graph, recorder.roots[0], recorder.nodes, fakes, places, mode, tuple(recorder.exchanged), opaque,
        frozenset(recorder.written), tuple(Kept(names[module][0], *change) for module, *change in kept),
        recorder.answered,
    )  # fmt: skip
