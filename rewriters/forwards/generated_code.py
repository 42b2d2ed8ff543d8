"""Functions generated from torch.fx graphs, which can be pickled.

Functions with the same code, as a network's blocks have, share it compiled. Its lines, which tracebacks show, are
dropped with the last of them.
"""

from __future__ import annotations

import hashlib
import importlib
import linecache
import types
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import fx


@dataclass(frozen=True)
class _ModuleName:
    name: str


class _Code:
    """Generated code; tracebacks show its lines as long as this object lives."""

    def __init__(self, source: str):
        name = f"<autogate rewritten forward {hashlib.sha256(source.encode()).hexdigest()[:16]}>"
        linecache.cache[name] = (len(source), None, source.splitlines(True), name)
        weakref.finalize(self, linecache.cache.pop, name, None)
        self.code = compile(source, name, "exec")


_CODES: weakref.WeakValueDictionary[str, _Code] = weakref.WeakValueDictionary()
"""By source: the blocks of a network, and both modes, mostly share theirs."""


def _compiled(source: str) -> _Code:
    """The compiled code of a source, shared with living forwards that have the same source."""
    code = _CODES.get(source)
    if code is None:
        code = _CODES[source] = _Code(source)
    return code


class GeneratedFunction:
    """A function that runs a graph; it takes the graph's module as its first argument.

    Attributes:
        source: its code.
        run: the function.
    """

    run: Callable[..., Any]

    def __init__(self, graph: fx.Graph):
        code = graph.python_code("self")
        self.source, self._globals = code.src, dict(code.globals)
        self._compile()

    def _compile(self) -> None:
        self._code = _compiled(self.source)
        scope = dict(self._globals)
        exec(self._code.code, scope)
        self.run = scope.pop("forward")  # it keeps the scope as its globals

    def __getstate__(self) -> dict[str, Any]:
        # Python modules (torch, math) can't be pickled; their names are stored.
        names = {
            key: _ModuleName(value.__name__) if isinstance(value, types.ModuleType) else value
            for key, value in self._globals.items()
        }
        return {"source": self.source, "_globals": names}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.source = state["source"]
        self._globals = {
            key: importlib.import_module(value.name) if isinstance(value, _ModuleName) else value
            for key, value in state["_globals"].items()
        }
        self._compile()
