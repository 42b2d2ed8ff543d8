"""Walk through the modules of a model. An analysis does that dozens of times."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn


def named_modules(model: nn.Module, remove_duplicate: bool = True) -> list[tuple[str, nn.Module]]:
    """As `model.named_modules()`, whose nested generators take five times as long for a deep model."""
    found, seen, left = [], set[nn.Module](), [("", model)]
    while left:
        path, module = left.pop()
        if remove_duplicate:
            if module in seen:
                continue
            seen.add(module)
        found.append((path, module))
        if module._modules:
            prefix = f"{path}." if path else ""
            children = [(prefix + name, child) for name, child in module._modules.items() if child is not None]
            left += children[::-1]
    return found


def modules_of(model: nn.Module) -> list[nn.Module]:
    """As `model.modules()`."""
    found, left = dict[nn.Module, None](), [model]
    while left:
        module = left.pop()
        if module in found:
            continue
        found[module] = None
        if module._modules:
            left += [child for child in module._modules.values() if child is not None][::-1]
    return [*found]


def tensor_slots(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, Tensor]]:
    """Every name of every parameter and buffer: (qualified name, module, name in the module, tensor)."""
    for path, module in named_modules(model):
        prefix = f"{path}." if path else ""
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                yield prefix + name, module, name, tensor


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters, and then buffers, by qualified name; a shared one once, under its first name."""
    found: tuple[dict[int, tuple[str, Tensor]], ...] = ({}, {})
    for name, module, own_name, tensor in tensor_slots(model):
        found[own_name not in module._parameters].setdefault(id(tensor), (name, tensor))
    return dict(one for own in found for one in own.values())
