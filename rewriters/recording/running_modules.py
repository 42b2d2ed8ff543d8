"""Follow a forward that runs for real: which module is running, what each is called with and returns."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

from torch import nn

from rewriters.recording.module_walk import named_modules

Seen = Callable[[str, int, str, Any], None]


class RunningModules:
    """Notes the module in which an error was raised.

    Args:
        model: the model whose modules are followed.
        seen: called with (path, number of the call, "input", arguments) whenever a module is called, and with
            "output" and the result, or "failed" and the error, when it is left.
    """

    def __init__(self, model: nn.Module, seen: Seen | None = None):
        self._paths = {module: path for path, module in named_modules(model)}
        self._seen = seen
        self._calls: dict[str, int] = {}
        self.running: list[str] = []
        self._failed: tuple[Exception | None, str] = (None, "")

    def failed_in(self, error: Exception) -> str:
        """Path of the innermost module that an error came through."""
        return self._failed[1] if self._failed[0] is error else ""

    @contextlib.contextmanager
    def followed(self) -> Iterator[None]:
        """Inside, the model's modules are followed."""
        plain_call = nn.Module.__call__

        def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if module not in self._paths:
                return plain_call(module, *args, **kwargs)
            path = self._paths[module]
            number = self._calls[path] = self._calls.get(path, -1) + 1
            if self._seen is not None:
                self._seen(path, number, "input", (args, kwargs))
            self.running.append(path)
            try:
                output = plain_call(module, *args, **kwargs)
            except Exception as error:
                self._failed = self._failed if self._failed[0] is error else (error, path)
                if self._seen is not None:
                    self._seen(path, number, "failed", error)
                raise
            finally:
                self.running.pop()
            if self._seen is not None:
                self._seen(path, number, "output", output)
            return output

        with mock.patch.object(nn.Module, "__call__", call):
            yield
