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

import weakref
from collections.abc import Callable, Iterable
from operator import is_
from typing import Any, NamedTuple, Protocol

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

    def kernels(self) -> list[nn.Parameter]:
        """The parameters by which the follower knows its optimizer."""

    def parameters_of_model(self) -> list[nn.Parameter]:
        """All parameters of its model."""

    def about_to_step(self, optimizer: Optimizer) -> None:
        """Called before each step of an optimizer that trains some of the model, before anything else."""

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


class _Counted(NamedTuple):
    """How many gated kernels are in each parameter group of an optimizer.

    Attributes:
        kernels: all gated kernels.
        groups: the parameters of each group.
        counts: of kernels in each group.
    """

    kernels: list[nn.Parameter]
    groups: list[list[nn.Parameter]]
    counts: list[int]

    @classmethod
    def of(cls, kernels: list[nn.Parameter], groups: list[list[nn.Parameter]]) -> _Counted:
        gated = set(map(id, kernels))
        return cls(
            kernels, [[*group] for group in groups], [sum(id(one) in gated for one in group) for group in groups]
        )

    def holds(self, kernels: list[nn.Parameter], groups: list[list[nn.Parameter]]) -> bool:
        """Whether these are still the kernels and the groups. A count would take several times as long as this."""
        pairs = [(self.kernels, kernels), *zip(self.groups, groups, strict=False)]
        return len(self.groups) == len(groups) and all(
            len(one) == len(other) and all(map(is_, one, other)) for one, other in pairs
        )


class _Turn:
    """Which optimizer's step moves a bank's gates."""

    def __init__(self) -> None:
        self._leader: weakref.ref[Optimizer] | None = None
        self._count = 0
        self._since: weakref.WeakSet[Optimizer] = weakref.WeakSet()
        self.stepping: weakref.ref[Optimizer] | None = None
        self.optimizers: weakref.WeakSet[Optimizer] = weakref.WeakSet()
        """All that have stepped and train some of the model."""
        self._others: weakref.WeakSet[Optimizer] = weakref.WeakSet()
        self._counted: weakref.WeakKeyDictionary[Optimizer, _Counted] = weakref.WeakKeyDictionary()

    def count(self, optimizer: Optimizer, bank: Follower) -> int:
        """How many of the bank's gated kernels the optimizer has."""
        kernels, groups = [*_kernels(bank)], [group["params"] for group in optimizer.param_groups]
        counted = self._counted.get(optimizer)
        if counted is None or not counted.holds(kernels, groups):
            counted = self._counted[optimizer] = _Counted.of(kernels, groups)
        return sum(counted.counts)

    def rate(self, optimizer: Optimizer) -> float:
        """The learning rate of most gated kernels that the optimizer has, by the latest count."""
        counts = self._counted[optimizer].counts
        return float(optimizer.param_groups[counts.index(max(counts))].get("lr", 0.0))

    def trains(self, optimizer: Optimizer, bank: Follower, count: int) -> bool:
        """Whether an optimizer that has `count` gated kernels trains some of the bank's model."""
        if optimizer in self.optimizers or optimizer in self._others:
            return optimizer in self.optimizers
        own = set() if count else set(map(id, bank.parameters_of_model()))
        trains = count > 0 or any(id(weight) in own for group in optimizer.param_groups for weight in group["params"])
        (self.optimizers if trains else self._others).add(optimizer)
        return trains

    def leads(self, optimizer: Optimizer, count: int) -> bool:
        """Whether gates move with this step of an optimizer that has `count` gated kernels."""
        leader = self._leader() if self._leader is not None else None
        if leader is optimizer or leader is None or count > self._count or optimizer in self._since:
            self._leader, self._count = weakref.ref(optimizer), count
            self._since.clear()
            return True
        self._since.add(optimizer)
        return False


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


def optimizers_of(bank: Follower) -> list[Optimizer]:
    """The optimizers that have stepped since the bank was made, still live and train some of its model."""
    turn, own = _turns.get(bank), set(map(id, bank.parameters_of_model()))
    return [
        optimizer for optimizer in ([] if turn is None else turn.optimizers)
        if any(id(weight) in own for group in optimizer.param_groups for weight in group["params"])
    ]  # fmt: skip


def gated_elsewhere(model: nn.Module) -> str | None:
    """Name of a parameter of `model` that a bank follows; None if there is none."""
    gated = {id(kernel) for bank in list(_turns) for kernel in _kernels(bank)}
    parameters = model.named_parameters() if gated else ()
    return next((name for name, parameter in parameters if id(parameter) in gated), None)


def is_capturing() -> bool:
    """Whether a CUDA graph is being captured, in which the host can't read a value."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def _kernels(bank: Follower) -> Iterable[nn.Parameter]:
    """A bank's kernels; none if a layer of its model was replaced. The model's own forward raises then, nobody else's
    step."""
    try:
        return bank.kernels()
    except AutogateError:
        return ()


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
        count = turn.count(optimizer, bank)
        # A step within a step (of a subclass's super(), of a wrapped optimizer) comes here again. The innermost moves
        # the kernels.
        within = turn.stepping is not None and turn.stepping() is optimizer
        if count and is_capturing():
            raise AutogateError(
                "this step is captured in a CUDA graph, and a replay calls no hooks: gates would not move.",
                where="optimizer.step",
                remedy="Capture forward and backward alone, or call prepare(..., hooks=False), and autogate.step after "
                "each replay.",
            )
        if not within and turn.trains(optimizer, bank, count):
            bank.about_to_step(optimizer)
        if count and (within or turn.leads(optimizer, count)):
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
                bank.step(turn.rate(optimizer))
        elif turn.count(optimizer, bank):
            bank.fold(stepped=True)


def _skipped(optimizer: Optimizer) -> bool:
    """Whether a fused optimizer has found infinite gradients and left the parameters as they are."""
    found = getattr(optimizer, "found_inf", None)
    return isinstance(found, torch.Tensor) and bool(found)
