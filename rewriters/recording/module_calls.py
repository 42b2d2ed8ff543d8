"""The calls of modules in a recorded forward."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import fx


@dataclass(eq=False)
class ModuleCall:
    """One call of one module: its arguments, its output, and the module calls and ATen nodes inside it.

    `names` are all names of the module in the model; the first is `path`. `asks_mode` says whether code that isn't
    torch's asked in it whether a module trains.
    """

    names: tuple[str, ...]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any = None
    children: list[ModuleCall] = field(default_factory=list)
    nodes: list[fx.Node] = field(default_factory=list)
    asks_mode: bool = False

    @property
    def path(self) -> str:
        return self.names[0]

    def walk(self) -> Iterator[ModuleCall]:
        """The call and all calls in it, in the order in which they began."""
        left = [self]
        while left:
            call = left.pop()
            yield call
            left += call.children[::-1]
