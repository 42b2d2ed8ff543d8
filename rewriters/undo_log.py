"""Changes to a live module tree, all of which can be undone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class UndoLog:
    """Applies changes to modules and remembers the values before."""

    def __init__(self) -> None:
        self._before: dict[int, tuple[dict[Any, Any], dict[Any, Any]]] = {}  # by the id of what was changed
        self._values: dict[int, tuple[Tensor, Tensor]] = {}

    def set(self, entries: dict[Any, Any], key: Any, value: Any) -> None:
        """`entries[key] = value`, for a module's `__dict__`, `_parameters`, `_buffers` or `_modules`."""
        self._note(entries)
        entries[key] = value

    def remove(self, entries: dict[Any, Any], key: Any) -> None:
        """`del entries[key]`."""
        self._note(entries)
        del entries[key]

    def _note(self, entries: dict[Any, Any]) -> None:
        if id(entries) not in self._before:
            self._before[id(entries)] = (entries, dict(entries))

    def set_attribute(self, module: nn.Module, name: str, value: Any) -> None:
        """Set a plain attribute (an int, a forward), past nn.Module's registration."""
        self.set(module.__dict__, name, value)

    def set_tensor(self, module: nn.Module, name: str, value: Tensor) -> None:
        """Replace a parameter or buffer."""
        self.set(module._parameters if name in module._parameters else module._buffers, name, value)

    @torch.no_grad()
    def write(self, tensor: Tensor, values: Tensor) -> None:
        """Write values to a tensor in place."""
        self._values.setdefault(id(tensor), (tensor, tensor.detach().clone()))
        tensor.copy_(values)

    @torch.no_grad()
    def undo(self) -> None:
        """Undo all changes; entries get their order back too."""
        for tensor, values in self._values.values():
            tensor.copy_(values)
        self._values.clear()
        for entries, before in self._before.values():
            entries.clear()
            entries.update(before)
        self._before.clear()
