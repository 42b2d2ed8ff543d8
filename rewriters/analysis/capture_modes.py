"""Record a model in every mode, and at every size, that the analysis needs.

A model is recorded in eval mode. It is recorded in train mode too where that is another forward: some layers
(auxiliary heads) run in that mode only, or code asks whether it trains. And it is recorded once more on inputs twice as
large where the size of its input may decide which channels are coupled.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from unittest import mock

from torch import Tensor, nn
from torch._subclasses import fake_tensor
from torch.utils._pytree import tree_map_only

from rewriters.analysis.same_forward import same_forward
from rewriters.errors import AutogateError
from rewriters.outputs import run_eval
from rewriters.recording import (
    AnsweredCalls,
    Capture,
    ModuleCall,
    Opaque,
    capture,
    named_modules,
    named_tensors,
    set_modes,
    set_train_mode,
    tensors_of,
)

_COMPARED = (bool, int, float, str, type(None))

Inputs = tuple[tuple[Any, ...], Mapping[str, Any]]
"""Example inputs by position and by name."""


def samples_in(args: Any, kwargs: Any) -> int:
    """The number of samples: the length of the first dimension of the first tensor among the inputs."""
    tensors = [tensor for tensor in tensors_of((args, kwargs)) if tensor.ndim]
    return max(1, tensors[0].shape[0]) if tensors else 1


@dataclass(frozen=True)
class Recorded:
    """A model's forward, recorded.

    Attributes:
        captures: in eval mode, and in train mode too if that is another forward which can be recorded.
        trains_otherwise: whether it is another forward in train mode, recorded or not.
    """

    captures: list[Capture]
    trains_otherwise: bool


def capture_modes(model: nn.Module, args: Any, kwargs: Any) -> Recorded:
    """Record a model in each mode that it has a forward of its own for."""
    before = set_modes(model, False)
    try:
        captures = [capture(model, args, kwargs)]
        if captures[0].exchanged:
            run_eval(model, args, kwargs)  # now the buffers are those for these inputs
            captures = [capture(model, args, kwargs)]
        unseen = _has_unseen_parameters(model, captures[0])
        trains_otherwise = unseen or _differs_in_train_mode(model, captures[0])
        if trains_otherwise:
            set_train_mode(model)
            known = captures[0].opaque
            captures += [capture(model, args, kwargs)] if unseen else _try_capture(model, args, kwargs, known)
    finally:
        set_modes(model, before)
    return Recorded(captures, trains_otherwise)


def _try_capture(
    model: nn.Module, args: Any, kwargs: Any, opaque: Mapping[str, Opaque], answers: AnsweredCalls | None = None
) -> list[Capture]:
    """The forward in the mode that the model is in; empty if it can't be recorded.

    In train mode a forward may want inputs that the example has none of (targets), or ask for the values of random
    numbers (whether to leave out a layer).
    """
    try:
        with mock.patch.object(fake_tensor.log, "disabled", True):  # failing is no error here, so it isn't logged
            return [capture(model, args, kwargs, opaque, answers)]
    except AutogateError:
        return []


def _differs_in_train_mode(model: nn.Module, captured: Capture) -> bool:
    """Whether code that asks for its mode does something else in train mode than in eval mode.

    Only the modules that ask are recorded in train mode, those of one kind once, and of each only its own code runs.
    """
    asking = [call for call in captured.calls() if call.asks_mode]
    kind = _kinds(model, asking)
    judged: set[Any] = set()
    tensors = {id(one): captured.tensors[name] for name, one in named_tensors(model).items()} if asking else {}

    def known(call: ModuleCall) -> bool:
        return all(kind[id(one)] in judged for one in call.walk() if one.asks_mode)

    for call in asking[::-1]:  # what is inside others first
        if kind[id(call)] in judged:
            continue
        module = model.get_submodule(call.path)
        before = set_train_mode(module)
        try:
            answers = AnsweredCalls(captured.mode, tensors, call, known, captured.written)
            found = _try_capture(module, call.args, call.kwargs, {}, answers)
        finally:
            set_modes(module, before)
        if not found or not same_forward(captured, call, found[0]):
            return True
        judged.add(kind[id(call)])
    return False


def _kinds(model: nn.Module, calls: list[ModuleCall]) -> dict[int, Any]:
    """The kind of each call, by its id. A class that is called once is a kind, whose text isn't made."""
    modules = [model.get_submodule(call.path) for call in calls]
    times = Counter(map(type, modules))
    pairs = zip(modules, calls, strict=True)
    return {id(call): _kind(module, call) if times[type(module)] > 1 else type(module) for module, call in pairs}


def _kind(module: nn.Module, call: ModuleCall) -> tuple[Any, ...]:
    """Equal for modules of the same class, with equal attributes and layers, that are called alike."""
    plain = {name: value for name, value in vars(module).items() if not isinstance(value, dict)}
    known = tuple((name, value if isinstance(value, _COMPARED) else id(value)) for name, value in plain.items())
    given = tuple((tuple(tensor.shape), tensor.dtype) for tensor in tensors_of((call.args, call.kwargs)))
    return type(module), repr(module), known, given


def capture_larger(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None, captures: list[Capture]
) -> list[Capture]:
    """The same captures for inputs twice as large; empty if the model can't run on these."""
    args, kwargs = tree_map_only(Tensor, _twice_as_large, (tuple(args), dict(kwargs or {})))
    before = set_modes(model, False)
    try:
        larger = []
        with mock.patch.object(fake_tensor.log, "disabled", True):  # failing is no error here, so it isn't logged
            for captured in captures:
                set_modes(model, False) if captured is captures[0] else set_train_mode(model)
                larger.append(capture(model, args, kwargs, captured.opaque))
        return larger
    except AutogateError:
        return []
    finally:
        set_modes(model, before)


def _twice_as_large(value: Tensor) -> Tensor:
    """Images (N, C, H, W), sequences (N, C, L) or volumes twice as large, without values; anything else as it is."""
    if value.ndim < 3 or not value.is_floating_point():
        return value
    return value.new_empty((*value.shape[:2], *(2 * size for size in value.shape[2:])))


def _has_unseen_parameters(model: nn.Module, captured: Capture) -> bool:
    """Whether some module with parameters wasn't called, and no other module used its parameters."""
    seen = {call.path for call in captured.calls()}
    used = {node.target for node in captured.graph.nodes if node.op == "get_attr" and node.users}
    return any(
        path not in seen and own and used.isdisjoint(own)
        for path, module in named_modules(model)
        for own in [{f"{path}.{name}".lstrip(".") for name, one in module._parameters.items() if one is not None}]
    )
