"""Note the calls of torch's functions that modules' own code makes while it is recorded, with the sources of numbers.

An op of ATen has numbers only: whether a size was read from a tensor or written down is lost. The calls noted here are
those of the code itself (`x.view(n, -1, self.heads, 8)`), as torch.fx would see them, but from a plain run.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Set
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from rewriters.recording.numbers_in_code import Sourced, plain, reads_noted, sourced
from rewriters.recording.pytrees import tensors_of
from rewriters.recording.recorder import ModuleCall, Recorder

_SHAPE = torch.Tensor.shape.__get__  # type: ignore[attr-defined]


@dataclass(frozen=True)
class FunctionCall:
    """A call of a function of torch.

    Attributes:
        function: what was called.
        args, kwargs: with numbers that know their sources.
        output: what it returned.
        nodes: the recorded ATen calls that it made.
    """

    function: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any
    nodes: tuple[fx.Node, ...]


@dataclass
class FunctionCalls:
    """The calls of functions that the code of some modules makes in one recording.

    Attributes:
        paths: the modules.
        made: what was called, and the numbers whose values the code asked for, in order, by module call.
    """

    paths: Set[str]
    made: dict[ModuleCall, list[FunctionCall | Sourced]] = field(default_factory=dict)

    @contextlib.contextmanager
    def noted(self, model: nn.Module, recorder: Recorder) -> Iterator[None]:
        """Inside, calls are noted. Attributes that are ints know their names; the caller restores them."""
        for path in self.paths:
            attributes = vars(model.get_submodule(path))
            for name, value in list(attributes.items()):
                if type(value) is int and not name.startswith("_"):
                    attributes[name] = sourced(value, ("attribute", path, name))
        with _Notes(self, recorder) as notes, reads_noted(notes.note):
            yield


class _Notes(TorchFunctionMode):
    def __init__(self, calls: FunctionCalls, recorder: Recorder) -> None:
        super().__init__()
        self._calls, self._recorder = calls, recorder

    def note(self, what: FunctionCall | Sourced) -> None:
        call = self._recorder.call
        if call is not None and call.path in self._calls.paths:
            self._calls.made.setdefault(call, []).append(what)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        call, kwargs = self._recorder.call, kwargs or {}
        with reads_noted(None):
            first = len(call.nodes) if call is not None else 0
            output = func(*args, **kwargs)
        if call is None or call.path not in self._calls.paths:
            return output
        if tensors_of(output) or func is torch.Tensor.__setitem__:
            self.note(FunctionCall(func, args, kwargs, output, tuple(call.nodes[first:])))
        return _with_sources(func, args, kwargs, output)


def _with_sources(func: Any, args: Any, kwargs: Any, output: Any) -> Any:
    """Sizes of a tensor, and its number of elements, with where they come from."""
    if isinstance(output, torch.Size) and (func == _SHAPE or (func is torch.Tensor.size and len(args) == 1)):
        return torch.Size([sourced(size, ("size", id(args[0]), dim)) for dim, size in enumerate(output)])
    if type(output) is not int or not args or not isinstance(args[0], Tensor):
        return output
    if func is torch.Tensor.size:
        dim = args[1] if len(args) > 1 else kwargs["dim"]
        return sourced(output, ("size", id(args[0]), plain(dim) % args[0].ndim))
    if func.__name__ in ("numel", "nelement"):
        return sourced(output, ("call", torch.Tensor.numel, (args[0],)))
    return output
