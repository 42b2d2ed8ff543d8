"""What a gate bank stores: buffers, read and written as values."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from autogate.methods import Gates, Method
from autogate.naming import tell_of_missing
from autogate.steering import Pressure


class Counters(NamedTuple):
    """The course of a run as plain numbers.

    Attributes:
        steps: steps taken.
        integral: the controller's memory.
        settled: the targets have been met.
        peak: the largest learning rate of the kernels so far.
    """

    steps: int
    integral: float
    settled: bool
    peak: float


class BankState(NamedTuple):
    """The buffers of a gate bank. They are written in place.

    Attributes:
        alpha, folded, dead, step_count, balance, integral, settled, peak: as in `GateBank`.
        method: the method's own tensors, by name.
    """

    alpha: Tensor
    folded: Tensor
    dead: Tensor
    step_count: Tensor
    balance: Tensor
    integral: Tensor
    settled: Tensor
    peak: Tensor
    method: Mapping[str, Tensor]

    @property
    def live(self) -> Tensor:
        """The classes that no folding has found dead, bool, shape (classes,)."""
        return self.dead == 0

    def counters(self) -> Counters:
        """The counters, in one transfer from the device."""
        count, integral, settled, peak = torch.stack([buffer.double() for buffer in self._counters()]).tolist()
        return Counters(int(count), integral, bool(settled), peak)

    def counters_version(self) -> tuple[Any, ...]:
        """Changes whenever a counter is written to or replaced."""
        return tuple((id(buffer), version_of(buffer)) for buffer in self._counters())

    def _counters(self) -> tuple[Tensor, ...]:
        return self.step_count, self.integral, self.settled, self.peak

    def gates(self, counters: Counters) -> Gates:
        """The gates as the learner takes them."""
        pressure = Pressure(0.0, counters.integral, counters.settled)
        return Gates(self.alpha, self.live, self.method, counters.steps, pressure, counters.peak)

    def write(self, after: Gates) -> Counters:
        """Store the gates after a step; folding takes care of who has died."""
        self.alpha.copy_(after.alpha)
        for name, value in after.state.items():
            self.method[name].copy_(value)
        self.step_count.fill_(after.count)
        self.balance.fill_(after.balance)
        self.integral.fill_(after.pressure.integral)
        self.settled.fill_(after.pressure.settled)
        self.peak.fill_(after.peak)
        return Counters(after.count, after.pressure.integral, after.pressure.settled, after.peak)


def version_of(tensor: Tensor) -> int:
    """Changes whenever the tensor is written to."""
    try:
        return tensor._version
    except RuntimeError:  # tensors of the inference mode have none
        return -1


def versions_of(tensors: Sequence[Tensor]) -> list[int]:
    """`version_of` each."""
    try:
        return [tensor._version for tensor in tensors]
    except RuntimeError:
        return [version_of(tensor) for tensor in tensors]


class BankBuffers(nn.Module):
    """The buffers of a gate bank, through casts, device moves and checkpoints."""

    alpha: Tensor
    folded: Tensor
    dead: Tensor
    step_count: Tensor
    balance: Tensor
    integral: Tensor
    settled: Tensor
    peak: Tensor
    layout: Tensor

    def register(self, begin: Callable[[], Gates], method: Method, checksum: int) -> None:
        """Make the buffers.

        Args:
            begin: gives the gates before the first step.
            method: tells their factors.
            checksum: of which channels each class has.
        """
        start = begin()
        self.register_buffer("alpha", start.alpha)
        for name, value in start.state.items():
            self.register_buffer(name, value)
        self.register_buffer("folded", method.factor(start.alpha, start.state).clone())  # it may be alpha itself
        self.register_buffer("dead", torch.zeros_like(start.alpha))
        for name in ("step_count", "balance", "integral", "settled", "peak"):
            self.register_buffer(name, torch.tensor(0.0, dtype=torch.float64))
        self.register_buffer("layout", torch.tensor(checksum, dtype=torch.float64))
        self._method_state, self._checksum = tuple(start.state), checksum
        self._first = begin, method

    def state(self) -> BankState:
        """The buffers as they are now: a module that is moved or loaded may get others.

        On the meta device, where they have no values, the state is that before the first step.
        """
        if self.alpha.is_meta:
            first = BankBuffers()
            first.register(*self._first, self._checksum)
            return first.state()
        method = {name: getattr(self, name) for name in self._method_state}
        return BankState(
            self.alpha, self.folded, self.dead, self.step_count, self.balance, self.integral, self.settled, self.peak,
            method,
        )  # fmt: skip

    def _forget(self) -> None:
        """Called when buffers were exchanged."""

    def _loaded(self) -> None:
        """Called when a checkpoint was loaded."""

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: Any, strict: bool, missing_keys: list[str],
        unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:  # fmt: skip
        layout = state_dict.get(f"{prefix}layout")
        if layout is not None and not abs(float(layout) - self._checksum) < 0.5:  # infinite if cast to half
            wrong = (
                "these gates belong to another model, or to this one prepared in another way (other inputs, `ignore`, "
                "`shortcuts` or `embed`). Prepare it as for the checkpoint's run."
            )
            if layout.dtype != self.layout.dtype:
                wrong = (
                    f"the checkpoint's gates were cast to {layout.dtype}, which can't hold their state. Load the "
                    "checkpoint as it was saved."
                )
            error_msgs.append(f"{prefix.rstrip('.')}: {wrong}")
            return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if layout is None:  # beside PyTorch's keys: whether these are an error is the caller's choice (`strict`)
            remark = (
                "this model has gates, and the state has none. Load a dense state before autogate.prepare, a slim "
                "model with autogate.load"
            )
            tell_of_missing(missing_keys, error_msgs, f"{prefix}alpha", remark)
        self._loaded()

    def _apply(self, fn: Any, recurse: bool = True) -> BankBuffers:
        # half() and bfloat16() are for the model's numbers: epsilon ends at 5e-8, below what half can hold.
        before = dict(self.named_buffers())
        super()._apply(fn, recurse)
        for name, buffer in self.named_buffers():
            if buffer.dtype != before[name].dtype:
                setattr(self, name, before[name].to(buffer.device))
        if before["alpha"].is_meta and not self.alpha.is_meta:  # to_empty gives memory with chance values
            device = self.alpha.device
            self.register(*self._first, self._checksum)
            for name, buffer in self.named_buffers():
                setattr(self, name, buffer.to(device))
        self._forget()
        return self
