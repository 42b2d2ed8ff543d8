"""A plan as an overlay: the slim model and the dense one in the same modules, one at a time.

`apply` replaces a model's tensors. An overlay leaves them where they are. What the plan would have changed stands in
the `__dict__` of the modules, where Python looks before PyTorch does: `layer.weight` is the slim kernel, while
`layer.parameters()`, `state_dict()` and optimizers have the dense one. Without the overlay the model is what it was.

    overlay = Overlay.of(model, slim_plan)
    overlay.put_fields()                                        # sizes and forwards
    for one in overlay.slices:
        for place in one.places:
            place.put(one.take())                               # gradients flow into the dense tensor
    overlay.remove()
"""

from __future__ import annotations

import types
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn

from rewriters.recording import tensor_slots
from rewriters.slimming.closed_columns import Columns
from rewriters.slimming.plan import SlimPlan, apply
from rewriters.slimming.tensors import take_indices
from rewriters.undo_log import UndoLog


class _Missing(Enum):
    """An attribute that isn't there. (An enum's members stay the same object in copies and pickles.)"""

    MISSING = "missing"


MISSING = _Missing.MISSING


@dataclass(frozen=True)
class Place:
    """Where a tensor stands: a module, and the tensor's name in it."""

    module: nn.Module
    name: str

    @property
    def owns(self) -> bool:
        """Whether the module has a parameter or buffer of this name."""
        return self.name in self.module._parameters or self.name in self.module._buffers

    def own(self) -> Tensor:
        """The tensor that the module owns."""
        own = self.module._parameters if self.name in self.module._parameters else self.module._buffers
        tensor = own[self.name]
        assert tensor is not None  # an overlay is made of places that had one
        return tensor

    def put(self, tensor: Tensor) -> None:
        """Put another tensor before the one that the module owns."""
        self.module.__dict__[self.name] = tensor

    def clear(self) -> None:
        """Let the module's own tensor be seen again."""
        self.module.__dict__.pop(self.name, None)


@dataclass(frozen=True, eq=False)
class TensorSlice:
    """The part of a dense tensor that a slim model has.

    Attributes:
        name: the tensor's first qualified name in the model.
        places: all places where the tensor stands; they share it.
        cuts: (dimension, indices that stay) for each dimension that loses any.
        closed: (dimension, bool of that length) for input sides where a dead channel stays, because a layer needs one:
            which indices of the slice aren't zero.
        is_view: whether it is a view of the dense tensor, because the first indices stay, and not a copy.
    """

    name: str
    places: tuple[Place, ...]
    cuts: tuple[tuple[int, Tensor], ...]
    closed: Columns = ()
    is_view: bool = False

    def take(self) -> Tensor:
        """The slice of the dense tensor as it is now; gradients flow into that.

        Several backward passes may go through one slice, each with its own part of the graph behind it.
        """
        dense = self.places[0].own()
        if self.is_view:
            for dim, indices in self.cuts:
                dense = dense.narrow(dim, 0, len(indices))
            return dense
        return _Take.apply(dense, self)  # type: ignore[no-any-return, no-untyped-call]

    def cut(self, dense: Tensor) -> Tensor:
        """The slice of a tensor of the dense one's shape."""
        return self._close(take_indices(dense, self.cuts))

    def spread(self, part: Tensor, shape: torch.Size) -> Tensor:
        """The transpose of `cut`: a tensor of the dense one's shape, zero but for the slice."""
        part = self._close(part)
        for dim, indices in reversed(self.cuts):
            longer = part.new_zeros((*part.shape[:dim], shape[dim], *part.shape[dim + 1 :]))
            part = longer.index_copy(dim, indices.to(part.device), part)
        return part

    def _close(self, part: Tensor) -> Tensor:
        for dim, is_open in self.closed:
            part = part * is_open.to(part).view([-1 if other == dim else 1 for other in range(part.ndim)])
        return part


class _Take(torch.autograd.Function):
    """A slice of a dense tensor. It saves nothing, so that several backward passes may go through it."""

    @staticmethod
    def forward(ctx: Any, dense: Tensor, one: TensorSlice) -> Tensor:
        ctx.slice, ctx.dense_shape = one, dense.shape
        return one.cut(dense)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return ctx.slice.spread(gradients[0], ctx.dense_shape), None


@dataclass(frozen=True, eq=False)
class Field:
    """An attribute that the slim model has another value of; `MISSING` if there is none."""

    module: nn.Module
    name: str
    slim: Any
    dense: Any

    def put(self, value: Any) -> None:
        if value is MISSING:
            self.module.__dict__.pop(self.name, None)
        else:
            self.module.__dict__[self.name] = value


@dataclass(frozen=True, eq=False)
class Hook:
    """An entry of a module's hooks that only the slim model has: in front of the caller's own.

    Attributes:
        module: the module.
        name: the attribute that holds the hooks.
        key, value: the entry.
    """

    module: nn.Module
    name: str
    key: int
    value: Any

    def put(self) -> None:
        hooks = self.module.__dict__[self.name]
        hooks[self.key] = self.value
        hooks.move_to_end(self.key, last=False)

    def remove(self) -> None:
        self.module.__dict__[self.name].pop(self.key, None)


@dataclass(frozen=True, eq=False)
class Overlay:
    """All that a slim model has in another form than the dense one.

    Attributes:
        slices: the tensors that lose indices.
        constants: tensors that only the slim model has, each with its place and qualified name.
        fields: sizes and forwards.
        hooks: on modules' forwards.
    """

    slices: tuple[TensorSlice, ...]
    constants: tuple[tuple[str, Place, Tensor], ...]
    fields: tuple[Field, ...]
    hooks: tuple[Hook, ...] = ()

    @classmethod
    def of(cls, model: nn.Module, slim_plan: SlimPlan, views: bool = False) -> Overlay:
        """The overlay that makes `model` what `apply` would make of it. The model is left as it was.

        Args:
            model: the dense model. Kernels of dead classes need not be zero, because the overlay leaves them out.
            slim_plan: made for this model.
            views: whether slices are views of the dense tensors where the first indices stay. They take no memory;
                a layer may need more time on them, as they aren't contiguous.
        """
        undo_log = _BesideLog()
        try:
            apply(model, replace(slim_plan, removed=frozenset()), undo_log)
            changed, hooks = list(undo_log.changes(model)), tuple(undo_log.hooks(model))
        finally:
            undo_log.undo()
        slots: dict[int, list[Place]] = {}
        tensors: dict[str, Tensor] = {}
        for name, module, own_name, tensor in tensor_slots(model):
            slots.setdefault(id(tensor), []).append(Place(module, own_name))
            tensors[name] = tensor
        cuts, closed = slim_plan.cuts(), slim_plan.closed
        slices = tuple(
            TensorSlice(
                name,
                tuple(slots[id(tensors[name])]),
                tuple(own),
                closed.get(name, ()),
                views and name not in closed and all(_is_prefix(indices) for _, indices in own),
            )
            for name in dict.fromkeys([*cuts, *closed])  # a layer may lose no index and all that it reads
            for own in [cuts.get(name, ())]
        )
        constants = []
        for name, value in slim_plan.constants.items():
            path, _, own_name = name.rpartition(".")
            constants.append((name, Place(model.get_submodule(path), own_name), value))
        beside = {place for one in slices for place in one.places} | {place for _, place, _ in constants}
        fields = tuple(one for one in changed if Place(one.module, one.name) not in beside)
        return cls(slices, tuple(constants), fields, hooks)

    def put_fields(self) -> None:
        """Give the modules the slim model's sizes, forwards and hooks."""
        for one in self.fields:
            one.put(one.slim)
        for hook in self.hooks:
            hook.put()

    def remove_fields(self) -> None:
        """Give the modules the dense model's sizes, forwards and hooks again, and clear what it has no tensor for."""
        for hook in self.hooks:
            hook.remove()
        for _, place, _ in self.constants:
            place.clear()
        for one in reversed(self.fields):
            one.put(one.dense)

    def remove(self) -> None:
        """Give the modules the dense model's tensors, sizes, forwards and hooks again."""
        for part in self.slices:
            for place in part.places:
                place.clear()
        self.remove_fields()


def with_all_forwards(overlays: Iterable[Overlay]) -> list[Overlay]:
    """The overlays of one model; where some have a rewritten forward, the others have their class's.

    Compiled code is chosen by what it finds in a module, and would not notice that there is nothing.
    """
    overlays = list(overlays)
    forwards = [{one.module: one for one in overlay.fields if one.name == "forward"} for overlay in overlays]
    rewritten = {module: None for own in forwards for module, one in own.items() if one.dense is MISSING}
    plain = {
        module: Field(module, "forward", types.MethodType(type(module).forward, module), MISSING)
        for module in rewritten
    }
    return [
        replace(overlay, fields=(*overlay.fields, *(one for module, one in plain.items() if module not in own)))
        for overlay, own in zip(overlays, forwards, strict=True)
    ]


def _is_prefix(indices: Tensor) -> bool:
    return torch.equal(indices, torch.arange(len(indices)).to(indices))


class _BesideLog(UndoLog):
    """Puts tensors beside those that modules own, and tells afterwards what has changed."""

    def set_tensor(self, module: nn.Module, name: str, value: Tensor) -> None:
        self.set(module.__dict__, name, value)

    def hooks(self, model: nn.Module) -> Iterator[Hook]:
        """The hooks that modules have now, and didn't have."""
        for module in model.modules():
            for name in ("_forward_hooks", "_forward_hooks_with_kwargs"):
                entries = module.__dict__[name]
                _, before = self._before.get(id(entries), (None, entries))
                yield from (Hook(module, name, key, value) for key, value in entries.items() if key not in before)

    def changes(self, model: nn.Module) -> Iterator[Field]:
        """What has another value now in the modules' `__dict__`."""
        for module in model.modules():
            _, before = self._before.get(id(module.__dict__), (None, module.__dict__))
            for name in {**before, **module.__dict__}:
                slim, dense = module.__dict__.get(name, MISSING), before.get(name, MISSING)
                if slim is not dense:
                    yield Field(module, name, slim, dense)
