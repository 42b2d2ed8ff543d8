"""Record a model in every mode, and at every size, that the analysis needs.

A model is recorded in eval mode. It is recorded in train mode too where some layers (auxiliary heads) run in that mode
only, and once more on inputs twice as large where the size of its input may decide which channels are coupled.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any
from unittest import mock

from torch import Tensor, nn
from torch._subclasses import fake_tensor
from torch.utils._pytree import tree_map_only

from rewriters.errors import AutogateError
from rewriters.outputs import run_eval
from rewriters.recording import Capture, capture, set_modes, tensors_of

Inputs = tuple[tuple[Any, ...], Mapping[str, Any]]
"""Example inputs by position and by name."""


def samples_in(args: Any, kwargs: Any) -> int:
    """The number of samples: the length of the first dimension of the first tensor among the inputs."""
    tensors = [tensor for tensor in tensors_of((args, kwargs)) if tensor.ndim]
    return max(1, tensors[0].shape[0]) if tensors else 1


def capture_modes(model: nn.Module, args: Any, kwargs: Any) -> list[Capture]:
    before = set_modes(model, False)
    try:
        captures = [capture(model, args, kwargs)]
        if captures[0].exchanged:
            run_eval(model, args, kwargs)  # now the buffers are those for these inputs
            captures = [capture(model, args, kwargs)]
        if _has_unseen_parameters(model, captures[0]):
            set_modes(model, True)
            captures.append(capture(model, args, kwargs))
    finally:
        set_modes(model, before)
    return captures


def capture_others(model: nn.Module, others: Sequence[Inputs]) -> list[Capture]:
    """Captures of the model in eval mode for more example inputs."""
    before = set_modes(model, False)
    try:
        return [capture(model, args, kwargs) for args, kwargs in others]
    finally:
        set_modes(model, before)


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
                set_modes(model, captured is not captures[0])
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
        for path, module in model.named_modules()
        for own in [{f"{path}.{name}".lstrip(".") for name, _ in module.named_parameters(recurse=False)}]
    )
