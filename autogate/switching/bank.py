"""The subnets of a model, one of which its modules are at a time.

`Subnets` is a child of the model. It holds the tensors that subnets have for themselves, and hooks on the model's
forward, which put the active subnet's tensors in place. Between two forwards the model's parameters and state_dict are
the shared, dense ones.
"""

from __future__ import annotations

import copy
import threading
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from autogate.slim import PrepareRecord, form_of
from autogate.switching.record import Fusing
from autogate.switching.subnet import Subnet
from autogate.wrappers import child_of
from rewriters import AutogateError, UndoLog
from rewriters.recording import drop_caches, with_caches
from rewriters.slimming import with_all_forwards

SUBNETS = "autogate_subnets"
"""Name of the model's child that holds its subnets."""


def check_one_width(model: object) -> None:
    """Raise if a model holds several subnets.

    Raises:
        AutogateError: it does.
    """
    if subnets_of(model) is not None:
        raise AutogateError(
            "it holds several subnets.",
            where=type(model).__name__,
            remedy="Take one out of it: slim = autogate.subnets.extract(model, flops=0.3).",
        )


def subnets_of(model: object) -> Subnets | None:
    """The subnets of a model; None if it has one width."""
    found = child_of(model, SUBNETS)
    return found if isinstance(found, Subnets) else None


class Subnets(nn.Module):
    """The subnets of a model: those that it was fused of, the smallest first, and widths between them.

    Args:
        subnets: each with the tree of its own tensors; the last one is the dense model itself.
        origin: how the model was analysed.
        record: how the subnets are made again.

    Attributes:
        full: number of the subnet that is the dense model. Those after it are widths that `add` was given.
        layout: 0-dim float64, a checksum of the channels of those that it was fused of. Checkpoints of other subnets
            are refused.
    """

    layout: Tensor

    def __init__(self, subnets: Sequence[tuple[Subnet, nn.Module]], origin: PrepareRecord, record: Fusing):
        super().__init__()
        for number, (_, tree) in enumerate(subnets):
            self.add_module(str(number), tree)
        self.subnets = [subnet for subnet, _ in subnets]
        self._checksum = zlib.crc32(repr([one.kept for one in record.structures]).encode())
        self.register_buffer("layout", torch.tensor(self._checksum, dtype=torch.float64))
        self.origin, self.record = origin, record
        self.active = self.full = len(subnets) - 1
        self._put_everywhere()
        self.teacher: Any = None
        self.teaches = False
        self._running = _Count()

    def attach(self, model: nn.Module) -> None:
        """Add this to the model, active in the forwards of it and of its copies."""
        self._caching = with_caches(model.modules())
        self.form = form_of(model, [SUBNETS])
        model.add_module(SUBNETS, self)
        before = model.register_forward_pre_hook(self._before_forward)
        after = model.register_forward_hook(self._after_forward, always_call=True)
        self._hooks = (before.id, after.id)
        model.__dict__["__deepcopy__"] = _DeepCopy(model)
        self.subnet.overlay.put_fields()
        self.subnet.put()

    def detach(self, model: nn.Module) -> None:
        """Take this off the model, which is the dense one again."""
        self.subnet.remove()
        model._forward_pre_hooks.pop(self._hooks[0])
        model._forward_hooks.pop(self._hooks[1])
        model._forward_hooks_always_called.pop(self._hooks[1])
        model._modules.pop(SUBNETS)
        model.__dict__.pop("__deepcopy__")

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        layout, error_msgs = state_dict.get(f"{prefix}layout"), rest[-1]
        if layout is not None and not abs(float(layout) - self._checksum) < 0.5:  # infinite if cast to half
            error_msgs.append(
                f"{prefix.rstrip('.')}: these subnets have other channels than the model's. Fuse it with the "
                "structures of the checkpoint's run; its norms would belong to other channels."
            )
            return
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def _apply(self, fn: Any, recurse: bool = True) -> Subnets:
        super()._apply(fn, recurse)
        self.layout = torch.tensor(self._checksum, dtype=torch.float64).to(self.layout.device)  # half can't hold it
        return self

    def forward(self, x: Any) -> Any:
        """Return `x`: a `nn.Sequential` runs all of its children."""
        return x

    @contextmanager
    def taken_off(self, model: nn.Module) -> Iterator[None]:
        """Inside, the model is the dense one, without this.

        Raises:
            AutogateError: a forward is running.
        """
        self._check_idle(model)
        self.subnet.remove()
        undo_log = UndoLog()
        undo_log.remove(model._modules, SUBNETS)
        undo_log.remove(model._forward_pre_hooks, self._hooks[0])
        undo_log.remove(model._forward_hooks, self._hooks[1])
        undo_log.remove(model._forward_hooks_always_called, self._hooks[1])
        undo_log.remove(model.__dict__, "__deepcopy__")
        try:
            yield
        finally:
            undo_log.undo()
            drop_caches(self._caching, UndoLog())
            self.subnet.overlay.put_fields()
            self.subnet.put()

    def add(self, subnet: Subnet, tree: nn.Module, branches: Mapping[str, tuple[bool, ...]]) -> int:
        """Add a width to those that can be switched to; the model is the dense one meanwhile (`taken_off`).

        Args:
            subnet: the width.
            tree: its own tensors.
            branches: what was decided of its dead branches.

        Returns:
            Its number.
        """
        number = len(self.subnets)
        self.add_module(str(number), tree)
        self.subnets.append(subnet)
        self._put_everywhere()
        record = self.record
        self.record = replace(
            record,
            branches=(*record.branches, branches),
            widths=(*record.widths, subnet.structure),
            first_statistics=(*record.first_statistics, subnet.first_statistics),
        )
        return number

    def _put_everywhere(self) -> None:
        """Let each subnet put something at every place where another does: compiled code looks at what is there."""
        everywhere = {place for subnet in self.subnets for place in subnet.places if place.owns}
        overlays = with_all_forwards([subnet.overlay for subnet in self.subnets])
        for subnet, overlay in zip(self.subnets, overlays, strict=True):
            subnet.overlay = overlay
            subnet.whole = sorted(everywhere - {*subnet.places}, key=lambda place: place.name)

    @property
    def subnet(self) -> Subnet:
        """The active subnet."""
        return self.subnets[self.active]

    def switch(self, model: nn.Module, index: int) -> None:
        """Make a subnet the active one.

        Raises:
            AutogateError: a forward is running, in this thread or another.
        """
        self._check_idle(model)
        if index == self.active:
            return
        self.subnets[index].put_after(self.subnet)
        drop_caches(self._caching, UndoLog())
        self.active = index

    def _check_idle(self, model: nn.Module) -> None:
        if self._running.value:
            raise AutogateError(
                "its forward is running, and would see two subnets.",
                where=type(model).__name__,
                remedy="Switch between forwards. Threads that need different subnets need copies of the model.",
            )

    @contextmanager
    def switched(self, model: nn.Module, index: int) -> Iterator[None]:
        """Inside, another subnet is the active one."""
        before = self.active
        self.switch(model, index)
        try:
            yield
        finally:
            self.switch(model, before)

    @torch.compiler.disable
    def _before_forward(self, model: nn.Module, args: Any) -> None:
        self._running.add(1)
        self.subnet.put()

    @torch.compiler.disable
    def _after_forward(self, model: nn.Module, args: Any, output: Any) -> None:
        self._running.add(-1)
        if self.teaches and self.active == self.full:
            self.teacher = tree_map_only(Tensor, torch.detach, output)


class _Count:
    """How many forwards are running, in all threads. A copy starts at none."""

    def __init__(self) -> None:
        self.value = 0
        self._lock = threading.Lock()

    def add(self, number: int) -> None:
        with self._lock:
            self.value = max(0, self.value + number)  # a hook of the user's may have raised before ours

    def __reduce__(self) -> tuple[type[_Count], tuple[()]]:
        return _Count, ()


class _DeepCopy:
    """The `__deepcopy__` of a switchable model."""

    def __init__(self, model: nn.Module):
        self.model = model

    def __call__(self, memo: dict[int, Any]) -> nn.Module:
        model, subnets = self.model, self.model._modules[SUBNETS]
        assert isinstance(subnets, Subnets)
        if hasattr(type(model), "__deepcopy__"):
            return _copied_its_own_way(model, subnets, memo)
        del model.__dict__["__deepcopy__"]
        try:
            with subnets.subnet.without_slices():
                copied = copy.deepcopy(model, memo)
        finally:
            model.__dict__["__deepcopy__"] = self
        copied.__dict__["__deepcopy__"] = _DeepCopy(copied)
        own = copied._modules[SUBNETS]
        assert isinstance(own, Subnets)
        own.subnet.put()
        return copied


def _copied_its_own_way(model: nn.Module, subnets: Subnets, memo: dict[int, Any]) -> nn.Module:
    """A copy of a model whose class says how to copy the dense one; its subnets are copied beside."""
    with subnets.taken_off(model):
        copied: nn.Module = copy.deepcopy(model, memo)
        here, there = (
            {**dict(one.named_modules()), **dict(one.named_parameters()), **dict(one.named_buffers())}
            for one in (model, copied)
        )
        if here.keys() != there.keys():
            raise AutogateError(
                "the copy that its class makes (__deepcopy__) has other modules or tensors than the model.",
                where=type(model).__name__,
                remedy="Let it copy all that the model has.",
            )
        own: Subnets = copy.deepcopy(subnets, {**memo, **{id(here[name]): there[name] for name in here}})
    own.attach(copied)
    return copied
