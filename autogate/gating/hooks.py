"""How optimizer steps reach the gates, in a training loop that knows nothing of them.

PyTorch calls global hooks around every optimizer's step. A bank whose gated kernels are among the optimizer's
parameters measures before the step: the kernels are still those that the gradients belong to, and optimizers that write
into `.grad` have not done so yet. It moves its gates after the step. If the step is given a closure, which is how
Lightning calls it, the closure is wrapped, so that gradients are read as soon as it has computed them.

Several optimizers may train a model. Gates move with the leader: the optimizer with the most gated kernels, or of equal
ones the first to step. After the steps of others only dead columns are zeroed. If another optimizer steps twice while
the leader doesn't, the other one leads.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim.optimizer import (
    Optimizer,
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from rewriters import AutogateError


class Follower(Protocol):
    """What moves with optimizer steps: a gate bank."""

    @property
    def added(self) -> Collection[str]:
        """Names of parameters that an optimizer built too early doesn't have."""

    def kernels(self) -> list[nn.Parameter]:
        """The parameters by which the follower knows its optimizer."""

    def added_weights(self) -> list[tuple[str, nn.Parameter]]:
        """Those of them that learn, with their names."""

    def measure(self, *, scale: Tensor | float | None = None, later: bool = False) -> None:
        """Called before the optimizer moves the kernels."""

    def read(self) -> None:
        """Called when a closure within the step has computed gradients."""

    def discard(self) -> None:
        """Called if the optimizer skips its step."""

    def fold(self, stepped: bool = False) -> None:
        """Called after the steps of other optimizers."""

    def step(self, lr: float) -> None:
        """Called after the step of the leading optimizer."""


class _Turn:
    """Which optimizer's step moves a bank's gates."""

    def __init__(self) -> None:
        self._leader: weakref.ref[Optimizer] | None = None
        self._count = 0
        self._since: weakref.WeakSet[Optimizer] = weakref.WeakSet()
        self.stepping: weakref.ref[Optimizer] | None = None
        self._held: set[int] = set()
        self._asked = False

    def note(self, optimizer: Optimizer, bank: Follower) -> None:
        """Warn of layers that prepare has added and no optimizer trains.

        This is known once every optimizer has had its turn: at the second step of one of them.
        """
        if self._asked:
            return
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        if held <= self._held:
            self._asked = True
            missing = [name for name, weight in bank.added_weights() if id(weight) not in self._held]
            if missing:
                warnings.warn(
                    f"no optimizer trains {', '.join(missing[:3])}{' and others' if missing[3:] else ''}: prepare has "
                    "added these layers on shortcuts. Build the optimizer after autogate.prepare.",
                    stacklevel=5,
                )
        self._held |= held

    def leads(self, optimizer: Optimizer, count: int) -> bool:
        """Whether gates move with this step of an optimizer that has `count` gated kernels."""
        leader = self._leader() if self._leader is not None else None
        if leader is optimizer or leader is None or count > self._count or optimizer in self._since:
            self._leader, self._count = weakref.ref(optimizer), count
            self._since.clear()
            return True
        self._since.add(optimizer)
        return False


@dataclass(frozen=True)
class _Hold:
    """How many gated kernels of a bank an optimizer has, and the learning rate of most of them."""

    count: int
    lr: float


_turns: weakref.WeakKeyDictionary[Follower, _Turn] = weakref.WeakKeyDictionary()
_installed = False


def register(bank: Follower) -> None:
    """Let `bank` follow the steps of any optimizer that has its kernels."""
    global _installed
    _turns[bank] = _Turn()
    if not _installed:
        # If an optimizer's step is compiled, Dynamo would trace the gates' step with it, which reads values.
        register_optimizer_step_pre_hook(torch.compiler.disable(_before_step))
        register_optimizer_step_post_hook(torch.compiler.disable(_after_step))
        _installed = True


def unregister(bank: Follower) -> None:
    """Let `bank` follow no optimizer any more."""
    _turns.pop(bank, None)


def is_capturing() -> bool:
    """Whether a CUDA graph is being captured, in which the host can't read a value."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def _hold(optimizer: Optimizer, bank: Follower) -> _Hold:
    kernels = {id(kernel) for kernel in bank.kernels()}
    total, most, lr = 0, 0, 0.0
    for group in optimizer.param_groups:
        count = sum(id(parameter) in kernels for parameter in group["params"])
        total += count
        if count > most:
            most, lr = count, float(group.get("lr", 0.0))
    return _Hold(total, lr)


class _ReadingClosure:
    """An optimizer's closure, and after it a bank's reading of the gradients."""

    def __init__(self, closure: Callable[[], Any], bank: Follower) -> None:
        self._closure, self.bank = closure, bank

    def __call__(self) -> Any:
        loss = self._closure()
        self.bank.read()
        return loss


def _before_step(
    optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    for bank, turn in list(_turns.items()):
        hold = _hold(optimizer, bank)
        # A step within a step (of a subclass's super(), of a wrapped optimizer) comes here again. The innermost moves
        # the kernels.
        within = turn.stepping is not None and turn.stepping() is optimizer
        if hold.count and is_capturing():
            raise AutogateError(
                "this step is captured in a CUDA graph, and a replay calls no hooks: gates would not move.",
                where="optimizer.step",
                remedy="Capture forward and backward alone, or call prepare(..., hooks=False), and autogate.step after "
                "each replay.",
            )
        if hold.count and bank.added:
            turn.note(optimizer, bank)
        if hold.count and (within or turn.leads(optimizer, hold.count)):
            turn.stepping = weakref.ref(optimizer)
            closure = args[1] if len(args) > 1 else kwargs.get("closure")
            # A fused optimizer unscales within its step: GradScaler sets this attribute for its duration.
            bank.measure(scale=getattr(optimizer, "grad_scale", None), later=closure is not None)
            if closure is not None and not (isinstance(closure, _ReadingClosure) and closure.bank is bank):
                reading = _ReadingClosure(closure, bank)
                if len(args) > 1:
                    args = (args[0], reading, *args[2:])
                else:
                    kwargs = {**kwargs, "closure": reading}
    return args, kwargs


def _after_step(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    for bank, turn in list(_turns.items()):
        if turn.stepping is not None and turn.stepping() is optimizer:
            turn.stepping = None
            if _skipped(optimizer):
                bank.discard()
                bank.fold()
            else:
                bank.step(_hold(optimizer, bank).lr)
        elif _hold(optimizer, bank).count:
            bank.fold(stepped=True)


def _skipped(optimizer: Optimizer) -> bool:
    """Whether a fused optimizer has found infinite gradients and left the parameters as they are."""
    found = getattr(optimizer, "found_inf", None)
    return isinstance(found, torch.Tensor) and bool(found)
