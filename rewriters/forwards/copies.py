"""Give a module another forward that its copies keep, whatever way of copying and pickling its class has.

A copy of a module has the entries of its `__dict__`, a rewritten forward among them. Classes with a `__getstate__`,
`__reduce__` or `__deepcopy__` of their own may leave it out: einops' layers store their pattern and are built again.
For a module of such a class a `__reduce_ex__` on the instance adds to the copy what the class left out.
"""

from __future__ import annotations

import copy
import types
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn

from rewriters.forwards.rewritten_forward import LiveForward, RewrittenForward, StaleMethod
from rewriters.undo_log import UndoLog

_WAYS = ("__getstate__", "__setstate__", "__reduce__", "__reduce_ex__", "__deepcopy__", "__copy__")


def set_forward(module: nn.Module, forward: Callable[..., Any] | None, undo_log: UndoLog) -> None:
    """Give a module this forward, or its class's if it is None. Copies of the module have it too.

    Methods whose code a rewritten forward has and doesn't call any more, with sizes that are others now, are shadowed.
    """
    replaced = (_Reduce, _DeepCopy) if isinstance(forward, RewrittenForward) else (_Reduce, _DeepCopy, StaleMethod)
    before = [name for name, value in module.__dict__.items() if isinstance(value, replaced)]
    for name in [*before, *(["forward"] if forward is None and "forward" in module.__dict__ else [])]:
        undo_log.remove(module.__dict__, name)
    if forward is not None:
        undo_log.set_attribute(module, "forward", forward)
    if isinstance(forward, RewrittenForward):
        for name in filter(partial(_is_method, module), sorted(forward.stale)):
            undo_log.set_attribute(module, name, StaleMethod(name, forward.path))
        own = {name for name in _WAYS if _is_own(type(module), name)}
        if own:
            undo_log.set_attribute(module, "__reduce_ex__", _Reduce(module))
        if "__deepcopy__" in own:
            undo_log.set_attribute(module, "__deepcopy__", _DeepCopy(module))


def _is_method(module: nn.Module, name: str) -> bool:
    return isinstance(getattr(type(module), name, None), types.FunctionType)


def _is_own(kind: type[nn.Module], name: str) -> bool:
    """Whether a class copies in a way of its own; those of torch's layers keep everything."""
    way = getattr(kind, name, None)
    plain = getattr(nn.Module, name, None)
    return way is not plain and not (getattr(way, "__module__", None) or "").startswith("torch.nn.")


class _Reduce:
    """The `__reduce_ex__` of a module whose class doesn't pickle all of it."""

    def __init__(self, owner: nn.Module):
        self.owner = owner

    def __call__(self, protocol: Any) -> Any:
        plain = type(self.owner).__reduce_ex__(self.owner, protocol)
        if not isinstance(plain, tuple):
            return plain
        made, args, state, *_ = (*plain, None)
        if isinstance(state, dict) and "forward" in state:  # the class copies its __dict__
            return plain
        return _rebuilt, (made, args, state, _Kept(self.owner))


class _DeepCopy:
    """The `__deepcopy__` of a module whose class has one."""

    def __init__(self, owner: nn.Module):
        self.owner = owner

    def __call__(self, memo: dict[int, Any]) -> nn.Module:
        copied = type(self.owner).__deepcopy__(self.owner, memo)  # type: ignore[attr-defined]  # or it has no such hook
        memo[id(self.owner)] = copied
        copy.deepcopy(_Kept(self.owner), memo).add_to(copied)
        return copied


class _Kept:
    """What a copy needs for a rewritten forward, without a reference to the module itself.

    Args:
        owner: the module.
    """

    def __init__(self, owner: nn.Module):
        self.forward = _without_owner(owner.__dict__["forward"])
        self.buffers: Mapping[str, Tensor | None] = dict(owner._buffers)
        self.modules: Mapping[str, nn.Module | None] = dict(owner._modules)

    def add_to(self, module: nn.Module) -> None:
        for name, buffer in self.buffers.items():
            module._buffers.setdefault(name, buffer)
        for name, child in self.modules.items():
            module._modules.setdefault(name, child)
        if not isinstance(module.__dict__.get("forward"), RewrittenForward):
            _give_owner(self.forward, module)
            set_forward(module, self.forward, UndoLog())


def _rebuilt(made: Callable[..., nn.Module], args: tuple[Any, ...], state: Any, kept: _Kept) -> nn.Module:
    """A module as its class unpickles it, with a rewritten forward."""
    module = made(*args)
    if state is not None:
        module.__setstate__(state)
    kept.add_to(module)
    return module


def _without_owner(forward: RewrittenForward) -> RewrittenForward:
    copied = copy.copy(forward)
    copied.owner = nn.Identity()
    if isinstance(copied, LiveForward):
        copied.plain = _without_owner(copied.plain) if isinstance(copied.plain, RewrittenForward) else None
    return copied


def _give_owner(forward: RewrittenForward, owner: nn.Module) -> None:
    forward.owner = owner
    if isinstance(forward, LiveForward) and isinstance(forward.plain, RewrittenForward):
        _give_owner(forward.plain, owner)
