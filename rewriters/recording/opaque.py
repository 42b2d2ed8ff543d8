"""Opaque modules: their forward can't be recorded, so the model runs once for real to see what goes in and comes out.

Recordings and the dry run don't run an opaque module. They get tensors without data, of the shapes that it returned
when it ran, and refuse if it is called with other shapes than then. All channels that it touches stay, those of its own
parameters included (`labelling/rules/opaque.py`).
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

from rewriters.recording.module_walk import named_modules
from rewriters.recording.pytrees import leaves_of, tensors_of
from rewriters.recording.running_modules import RunningModules
from rewriters.recording.side_effects import attributes_preserved, generators_kept


def opaque_call(reason: str, given: list[Tensor], own: list[Tensor]) -> tuple[Tensor, ...]:
    """Stand for the call of an opaque module in a recorded graph. It is never run.

    Args:
        reason: why the module can't be recorded.
        given: all tensors that go in.
        own: parameters and buffers of the module and of the modules that it calls.
    """
    raise RuntimeError(f"a recorded graph is not run through an opaque module: {reason}")


@dataclass(frozen=True)
class TensorSpec:
    """What is known of a tensor without its data."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, tensor: Tensor) -> TensorSpec:
        return cls(tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device)

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
        output: what came out, each tensor as a `TensorSpec`; None if it holds anything else, or no tensor.
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
        """The calls of these modules that aren't inside another one of them."""
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
        inside: paths of the modules that these calls ran, its own included.
    """

    reason: str
    calls: tuple[RealCall, ...]
    inside: frozenset[str]


class FailsForRealError(Exception):
    """A forward fails on real tensors too, in the module at `path`; `__cause__` is its error."""

    def __init__(self, path: str):
        super().__init__(path)
        self.path = path


class RecordedOutputs:
    """The outputs of opaque modules, call by call, as tensors that `make` makes from their specs."""

    def __init__(self, opaque: Mapping[str, Opaque], make: Callable[[TensorSpec], Tensor]):
        self._left = {
            path: iter([(call.given, tree_map_only(TensorSpec, make, call.output)) for call in one.calls])
            for path, one in opaque.items()
        }

    def next(self, path: str, args: Any, kwargs: Any) -> Any:
        """The output of a module's next call. Raises if it was called with other shapes when it ran."""
        given, output = next(self._left[path], (None, None))
        shapes = [tuple(tensor.shape) for tensor in tensors_of((args, kwargs))]
        if shapes != given:
            raise RuntimeError(f"it is called with tensors of shapes {shapes}, but with {given} when it ran for real")
        return output


def run_for_real(
    model: nn.Module, tensors: Mapping[str, Tensor], args: Any, kwargs: Any, names: Mapping[nn.Module, list[str]]
) -> RealCall | None:
    """Run a forward as it is and return its module calls; None if any tensor has no values.

    The model, its inputs and the state of random number generators are afterwards as before.

    Args:
        model: in the mode that it is to run in.
        tensors: its parameters and buffers, by all their names.
        args: example inputs by position.
        kwargs: example inputs by name.
        names: all names of each module in the model; the first is its path.

    Raises:
        FailsForRealError: the forward fails.
    """
    args, kwargs = tree_map_only(Tensor, lambda tensor: tensor.detach().clone(), (args, kwargs))
    present = [*tensors.values(), *tensors_of((args, kwargs))]
    if any(tensor.is_meta for tensor in present):
        return None
    noting = _Noting()
    running = RunningModules(model, noting.seen)
    try:
        with attributes_preserved(names), generators_kept(model, present), torch.no_grad(), running.followed():
            functional_call(model, _buffers_copied(tensors), args, kwargs, tie_weights=False)
    except Exception as error:
        raise FailsForRealError(running.failed_in(error)) from error
    return noting.roots[0]


def _buffers_copied(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The parameters, and copies of the buffers that the forward may write to; shared ones stay shared."""
    copies = {id(one): one.clone() for one in tensors.values() if not isinstance(one, nn.Parameter)}
    return {name: copies.get(id(one), one) for name, one in tensors.items()}


class _Noting:
    """Notes the module calls of a forward."""

    def __init__(self) -> None:
        self.roots: list[RealCall] = []
        self._open: list[RealCall] = []

    def seen(self, path: str, number: int, what: str, value: Any) -> None:
        """As `RunningModules` calls it."""
        if what == "input":
            inner = RealCall(path, [tuple(tensor.shape) for tensor in tensors_of(value)])
            (self._open[-1].children if self._open else self.roots).append(inner)
            self._open.append(inner)
        else:
            inner = self._open.pop()
            inner.output = _noted(value) if what == "output" else None


def _noted(output: Any) -> Any:
    leaves = leaves_of(output)
    plain = all(leaf is None or _is_plain(leaf) for leaf in leaves)
    if not plain or all(leaf is None for leaf in leaves):
        return None
    return tree_map(lambda leaf: None if leaf is None else TensorSpec.of(leaf), output)


def _is_plain(leaf: Any) -> bool:
    return type(leaf) in (Tensor, nn.Parameter) and leaf.layout is torch.strided and not leaf.is_quantized


def innermost_opaque(paths: list[str], run: RealCall, opaque: Collection[str]) -> str | None:
    """The innermost of some nested modules that can be opaque; None if none can.

    The root can't, because nothing would be left to slim. Neither can a module that returns anything but tensors in
    containers.

    Args:
        paths: modules one inside the other, innermost first.
        run: the calls when the model ran for real.
        opaque: paths of the modules that are opaque already.
    """
    for path in paths:
        if path and path not in opaque:
            calls = [call for call in run.outermost({*opaque, path}) if call.path == path]
            if calls and all(call.output is not None for call in calls):
                return path
    return None


def opaque_modules(run: RealCall, reasons: Mapping[str, str]) -> dict[str, Opaque]:
    """The opaque modules by path, without those that only run inside another one; `reasons` says why each is."""
    calls: dict[str, list[RealCall]] = {}
    for call in run.outermost(reasons):
        calls.setdefault(call.path, []).append(call)
    return {
        path: Opaque(reasons[path], tuple(own), frozenset(inner.path for one in own for inner in one.walk()))
        for path, own in calls.items()
    }


@contextlib.contextmanager
def opaque_modules_stubbed(model: nn.Module, opaque: Mapping[str, Opaque]) -> Iterator[None]:
    """Inside, a call of an opaque module doesn't run it: it returns meta tensors of the recorded shapes."""
    if not opaque:
        yield
        return
    paths = {module: path for path, module in named_modules(model) if path in opaque}
    replies = RecordedOutputs(opaque, TensorSpec.meta)
    plain_call = nn.Module.__call__

    def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if module in paths:
            return replies.next(paths[module], args, kwargs)
        return plain_call(module, *args, **kwargs)

    with mock.patch.object(nn.Module, "__call__", call):
        yield
