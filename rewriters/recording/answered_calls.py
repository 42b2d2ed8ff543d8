"""Record a module's own code again, and answer the calls of its children from an earlier recording.

A module that asks whether it trains is recorded in train mode too. What its children do is known: they don't ask, or
were judged before. So only its own code runs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Set
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_map_only

from rewriters.recording.module_calls import ModuleCall
from rewriters.recording.opaque import TensorSpec
from rewriters.recording.pytrees import leaves_of, tensors_of

_PLAIN = (bool, int, float, str, type(None), torch.dtype, torch.device)


class AnsweredCalls:
    """The outputs of a module's children, in the order in which an earlier recording called them.

    Args:
        mode: of that recording.
        tensors: its fake tensors, by the ids of the parameters and buffers.
        call: the module's call in that recording.
        known: whether a child's call does the same in the mode that is recorded now.
        written: paths of modules on which the code of another module sets attributes, in that recording.
    """

    def __init__(
        self, mode: FakeTensorMode, tensors: Mapping[int, Tensor], call: ModuleCall,
        known: Callable[[ModuleCall], bool], written: Set[str],
    ):  # fmt: skip
        self.mode, self.tensors = mode, tensors
        self._prefix = f"{call.path}." if call.path else ""
        self._left = iter(call.children)
        self._known, self._written = known, written

    def next(self, inner: ModuleCall, written: Set[str]) -> ModuleCall | None:
        """The earlier call whose output this one gets; None if the child has to run.

        Args:
            inner: the child's call in it.
            written: paths, from the module, on which the code of others has set attributes in it so far.
        """
        earlier = next(self._left, None)
        if earlier is None or earlier.path != self._prefix + inner.path:
            self._left = iter(())
            return None
        paths = {one.path for one in earlier.walk()}
        if not paths.isdisjoint(self._written | {self._prefix + path for path in written}):
            return None
        if not self._known(earlier) or not _alike((earlier.args, earlier.kwargs), (inner.args, inner.kwargs)):
            return None
        if not all(isinstance(leaf, (Tensor, *_PLAIN)) for leaf in leaves_of(earlier.output)):
            return None
        given = zip(tensors_of((earlier.args, earlier.kwargs)), tensors_of((inner.args, inner.kwargs)), strict=True)
        now = {id(one): other for one, other in given}  # an op in place returns what it was given
        with _disable_current_modes():  # to make a tensor is no step of the forward
            inner.output = tree_map_only(
                Tensor,
                lambda one: now[id(one)] if id(one) in now else TensorSpec.of(one).fake(self.mode),
                earlier.output,
            )
        inner.children = earlier.children
        return earlier


def _alike(one: Any, other: Any) -> bool:
    """Whether two calls have equal arguments, but for the values of tensors."""
    mine, theirs = leaves_of(one), leaves_of(other)
    same_names = list(one[1]) == list(other[1])
    return same_names and len(mine) == len(theirs) and all(map(_is_like, mine, theirs))


def _is_like(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return TensorSpec.of(one) == TensorSpec.of(other)
    return type(one) is type(other) and isinstance(one, _PLAIN) and bool(one == other)
