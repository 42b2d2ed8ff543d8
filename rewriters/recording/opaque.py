"""Modules whose forward can't be recorded: the model runs once for real, which tells what they are given and give.

Such a module is opaque from then on. A recording, and the dry run, don't run it: they are handed tensors without
data, of the shapes that it gave, and all channels that it touches stay.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.func import functional_call
from torch.utils._pytree import tree_map, tree_map_only

from rewriters.recording.pytrees import leaves_of
from rewriters.recording.side_effects import attributes_preserved, random_numbers_kept


def opaque_call(reason: str, given: list[Tensor], own: list[Tensor]) -> tuple[Tensor, ...]:
    """What stands in a recorded graph for the call of an opaque module; it is never run.

    Args:
        reason: why it couldn't be recorded.
        given: all tensors that go in.
        own: parameters and buffers of the module, and of those that it calls.
    """
    raise RuntimeError(f"a recorded graph is not run through an opaque module: {reason}")


@dataclass(frozen=True)
class TensorSpec:
    """A tensor without its data."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    def meta(self) -> Tensor:
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device="meta")

    def fake(self, mode: FakeTensorMode) -> Tensor:
        return FakeTensor(mode, self.meta(), self.device)


@dataclass(eq=False)
class RealCall:
    """One call of one module when the model ran for real.

    Attributes:
        path: the module.
        given: shapes of the tensors that went in.
        output: what came out, each tensor as `TensorSpec`; None where it holds anything else, or no tensor.
        children: the calls inside it.
    """

    path: str
    given: list[tuple[int, ...]]
    output: Any = None
    children: list[RealCall] = field(default_factory=list)

    def walk(self) -> Iterator[RealCall]:
        yield self
        for child in self.children:
            yield from child.walk()

    def outermost(self, paths: Collection[str]) -> Iterator[RealCall]:
        """The calls of these modules that are in no other's call."""
        if self.path in paths:
            yield self
            return
        for child in self.children:
            yield from child.outermost(paths)


@dataclass(frozen=True)
class Opaque:
    """A module that can't be recorded.

    Attributes:
        reason: why.
        calls: its calls when it ran for real, in order.
        inside: paths of the modules that were called in them, its own among them.
    """

    reason: str
    calls: tuple[RealCall, ...]
    inside: frozenset[str]


class FailsForRealError(Exception):
    """A forward fails on real tensors, in the module at `path`; the cause is its error."""

    def __init__(self, path: str):
        super().__init__(path)
        self.path = path


class RecordedOutputs:
    """Hands out what opaque modules gave, call by call, as tensors that `make` makes of what was noted."""

    def __init__(self, opaque: Mapping[str, Opaque], make: Callable[[TensorSpec], Tensor]):
        self._left = {
            path: iter([(call.given, tree_map_only(TensorSpec, make, call.output)) for call in one.calls])
            for path, one in opaque.items()
        }

    def next(self, path: str, args: Any, kwargs: Any) -> Any:
        """What a module gave in its next call (raises where it was called otherwise then)."""
        given, output = next(self._left[path], (None, None))
        shapes = [tuple(tensor.shape) for tensor in tensors_in(args, kwargs)]
        if shapes != given:
            raise RuntimeError(f"it is given tensors of shapes {shapes}, and {given} when it ran for real")
        return output


def tensors_in(args: Any, kwargs: Any) -> list[Tensor]:
    """Tensors among a call's arguments, also those in fields of objects that PyTorch doesn't look into."""
    leaves = leaves_of((args, kwargs))
    hidden = (leaves_of(vars(leaf)) for leaf in leaves if _hides_tensors(leaf))
    return [leaf for leaf in (*leaves, *(leaf for found in hidden for leaf in found)) if isinstance(leaf, Tensor)]


def _hides_tensors(leaf: Any) -> bool:
    return hasattr(leaf, "__dict__") and not isinstance(leaf, (Tensor, nn.Module, type)) and not callable(leaf)


def run_for_real(
    model: nn.Module, tensors: Mapping[str, Tensor], args: Any, kwargs: Any, names: Mapping[nn.Module, list[str]]
) -> RealCall | None:
    """Run a forward as it is, and note its module calls; None where there are no values.

    Nothing in the model changes, its inputs don't, and random numbers come afterwards as they would have come.

    Args:
        model: in the mode that it is to run in.
        tensors: its parameters and buffers by every name that they have.
        args: example inputs by position.
        kwargs: example inputs by name.
        names: of each module in the model, the first of them its path.

    Raises:
        FailsForRealError: the forward fails.
    """
    args, kwargs = tree_map_only(Tensor, lambda tensor: tensor.detach().clone(), (args, kwargs))
    present = [*tensors.values(), *tensors_in(args, kwargs)]
    if any(tensor.is_meta for tensor in present):
        return None
    devices = {tensor.device for tensor in present if tensor.is_cuda}
    noting = _Noting(names)
    try:
        with attributes_preserved(names), random_numbers_kept(devices), torch.no_grad(), noting.calls():
            functional_call(model, _buffers_copied(tensors), args, kwargs, tie_weights=False)
    except Exception as error:
        raise FailsForRealError(noting.failed_in(error)) from error
    return noting.roots[0]


def _buffers_copied(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The parameters, and copies of the buffers for the forward to write to; what is shared stays shared."""
    copies = {id(one): one.clone() for one in tensors.values() if not isinstance(one, nn.Parameter)}
    return {name: copies.get(id(one), one) for name, one in tensors.items()}


class _Noting:
    """Notes the module calls of a forward, and where an error comes from."""

    def __init__(self, names: Mapping[nn.Module, list[str]]):
        self.roots: list[RealCall] = []
        self._names = names
        self._open: list[RealCall] = []
        self._failed: tuple[Exception | None, str] = (None, "")

    def failed_in(self, error: Exception) -> str:
        """Path of the innermost module that the error passed through."""
        return self._failed[1] if self._failed[0] is error else ""

    @contextlib.contextmanager
    def calls(self) -> Iterator[None]:
        plain_call = nn.Module.__call__

        def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if module not in self._names:
                return plain_call(module, *args, **kwargs)
            inner = RealCall(self._names[module][0], [tuple(tensor.shape) for tensor in tensors_in(args, kwargs)])
            (self._open[-1].children if self._open else self.roots).append(inner)
            self._open.append(inner)
            try:
                output = plain_call(module, *args, **kwargs)
            except Exception as error:
                self._failed = self._failed if self._failed[0] is error else (error, inner.path)
                raise
            finally:
                self._open.pop()
            inner.output = _noted(output)
            return output

        with mock.patch.object(nn.Module, "__call__", call):
            yield


def _noted(output: Any) -> Any:
    leaves = leaves_of(output)
    plain = all(leaf is None or _is_plain(leaf) for leaf in leaves)
    if not plain or all(leaf is None for leaf in leaves):
        return None
    return tree_map(lambda leaf: None if leaf is None else _note(leaf), output)


def _is_plain(leaf: Any) -> bool:
    return type(leaf) in (Tensor, nn.Parameter) and leaf.layout is torch.strided and not leaf.is_quantized


def _note(tensor: Tensor) -> TensorSpec:
    return TensorSpec(tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device)


def innermost_opaque(paths: list[str], run: RealCall, opaque: Collection[str]) -> str | None:
    """The first of some modules that can be opaque beside those that are; None where none can.

    The root can't: nothing would be left to slim. Neither can one that gives anything else than tensors in
    containers.

    Args:
        paths: modules one inside the other, the innermost first.
        run: the calls when the model ran for real.
        opaque: paths of the opaque modules.
    """
    for path in paths:
        if path and path not in opaque:
            calls = [call for call in run.outermost({*opaque, path}) if call.path == path]
            if calls and all(call.output is not None for call in calls):
                return path
    return None


def opaque_modules(run: RealCall, reasons: Mapping[str, str]) -> dict[str, Opaque]:
    """The opaque modules by path, but for those that run inside another alone; `reasons` says why each is."""
    calls: dict[str, list[RealCall]] = {}
    for call in run.outermost(reasons):
        calls.setdefault(call.path, []).append(call)
    return {
        path: Opaque(reasons[path], tuple(own), frozenset(inner.path for one in own for inner in one.walk()))
        for path, own in calls.items()
    }


@contextlib.contextmanager
def opaque_modules_stubbed(model: nn.Module, opaque: Mapping[str, Opaque]) -> Iterator[None]:
    """Inside, opaque modules aren't run when they are called: they give meta tensors of the shapes that they gave."""
    if not opaque:
        yield
        return
    paths = {module: path for path, module in model.named_modules() if path in opaque}
    replies = RecordedOutputs(opaque, TensorSpec.meta)
    plain_call = nn.Module.__call__

    def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if module in paths:
            return replies.next(paths[module], args, kwargs)
        return plain_call(module, *args, **kwargs)

    with mock.patch.object(nn.Module, "__call__", call):
        yield
