"""What gated kernels read while a model runs, and where a constant behind them could go."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from autogate.criteria import GatedCalls, Seen
from rewriters import ChannelMap, Side

LEAST_ROWS, ROWS_PER_CHANNEL = 4096, 4
"""Of what a kernel reads, rows are drawn: so many, or so many times its channels."""

Place = tuple[int, int, tuple[int, ...], tuple[int, ...]]
"""Which part of which memory a tensor is: storage, offset, shape, strides."""


def storage_of(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def place_of(tensor: Tensor) -> Place:
    return storage_of(tensor), int(tensor.storage_offset()), tuple(tensor.shape), tensor.stride()


def count_rows(reads: Tensor) -> int:
    return reads.shape[:-1].numel()


def drawn(reads: Tensor) -> Tensor:
    """Some of the rows of what is read, always the same of as many: of shape (..., channels), (rows, channels) float32.

    What isn't drawn is not copied.
    """
    count, channels = count_rows(reads), reads.shape[-1]
    wanted = max(LEAST_ROWS, ROWS_PER_CHANNEL * channels)
    if count <= wanted:
        return reads.reshape(-1, channels).to(torch.float32, copy=True)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))[:wanted].sort().values
    return reads[torch.unravel_index(order.to(reads.device), reads.shape[:-1])].float()


@dataclass
class Part:
    """A gated kernel, or a part of one, as calls read it.

    Attributes:
        side: the gated side.
        index: the indices along it that are read.
        kept: which of these stay, int64.
        gone: which of these close, int64; those that were closed before are in neither.
        lost: the columns of the kernel that close, along the dimension that is summed over.
        reads: for each call, rows of what it reads: shape (rows, indices).
        lengths: for each call, how many rows there were.
        uses: for each op that takes an output: the running mean, if it is a batch norm in eval mode, or None.
        biases: for each call, where the bias that is added to the outputs lies.
        outputs: how many there are along `Call.output`; None if the call has none.
    """

    side: Side
    index: Tensor
    kept: Tensor
    gone: Tensor
    lost: Tensor
    reads: list[Tensor] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    uses: list[Place | None] = field(default_factory=list)
    biases: list[Place | None] = field(default_factory=list)
    outputs: int | None = None


class Reader(TorchDispatchMode):
    """While active, notes what gated kernels read.

    Args:
        model: the model.
        channel_map: its gated sides.
        was: the classes that live, bool, on the CPU.
        live: those that are going to.

    Attributes:
        calls: recognises the kernels.
        parts: of those that lose channels, what they read.
    """

    def __init__(self, model: nn.Module, channel_map: ChannelMap, was: Tensor, live: Tensor):
        super().__init__()
        self.calls = GatedCalls(model, channel_map)
        self.parts: dict[Place, Part] = {}
        self._classes = channel_map.classes
        self._was, self._live = (torch.cat([classes, classes.new_ones(1)]) for classes in (was, live))
        self._made = WeakIdKeyDictionary()
        self._owned = {storage_of(tensor) for tensor in (*model.parameters(), *model.buffers())}
        self._norms = Counter[Place]()
        self._indices: dict[Place, tuple[Side, Tensor]] = {}
        self._users: dict[int, set[tuple[Place, Place | None]]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        seen = next(self.calls.of(func, args), None)
        place = None if seen is None else place_of(seen.call.kernel)
        if func in _NORMS and args[3] is not None:
            self._norms[place_of(args[3])] += 1
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, Tensor):
                self._note_use(func, args, tensor, place)
        if seen is not None and place is not None:
            self._indices[place] = seen.side, seen.indices
            self._note_call(seen, place)
        outputs = func(*args, **(kwargs or {}))
        if place in self.parts:
            self._made[outputs] = place
        return outputs

    def _note_use(self, func: Any, args: tuple[Any, ...], tensor: Tensor, place: Place | None) -> None:
        if storage_of(tensor) in self._owned and not func.is_view:
            self._users.setdefault(storage_of(tensor), set()).add((place_of(tensor), place))
        if tensor in self._made:
            mean = running_mean_of(func, args, tensor)
            self.parts[self._made[tensor]].uses.append(mean)

    def _note_call(self, seen: Seen, place: Place) -> None:
        with torch.utils._python_dispatch._disable_current_modes():
            part = self.parts.get(place) or self._part(seen)
            if part is None:
                return
            self.parts[place] = part
            reads = seen.call.reads(len(seen.indices))
            part.reads.append(drawn(reads))
            part.lengths.append(count_rows(reads))
            part.biases.append(None if seen.call.bias is None else place_of(seen.call.bias))
            output = seen.call.output
            part.outputs = None if output is None else seen.call.kernel.shape[output]

    def _part(self, seen: Seen) -> Part | None:
        """What is going to be lost of a kernel; None if nothing is."""
        side, index, call = seen
        if side not in self._classes:
            return None
        classes = self._classes[side][index.cpu()].cpu()
        kept = self._live[classes].nonzero().flatten().to(index.device)
        gone = (self._was & ~self._live)[classes].nonzero().flatten().to(index.device)
        if not len(gone):
            return None
        return Part(side, index, kept, gone, call.kernel.detach().index_select(call.dim, gone))

    def is_alone(self, place: Place) -> bool:
        """Whether nothing but calls of this part reads its weights."""
        own = self._indices[place]
        for other, reader in self._users[place[0]]:
            if reader is None:
                return False
            if other != place:
                side, index = self._indices[reader]
                if side != own[0] or not set(index.tolist()).isdisjoint(own[1].tolist()):
                    return False
        return True

    def constant_of(self, place: Place) -> Place | None:
        """Where a constant that is added to a part's outputs goes: their bias, or the running mean of the norm behind.

        None if neither is there, or something else reads it.
        """
        part = self.parts[place]
        has_bias = set(part.biases) != {None}
        found = set(part.biases if has_bias else part.uses)
        (target,) = found if len(found) == 1 else (None,)
        if target is None or target[0] not in self._owned or target[2] != (part.outputs,):
            return None
        if has_bias:
            others = [other for other, reader in self._users[target[0]] if reader != place]
            return None if any(_overlap(target, other) for other in others) else target
        return target if len(part.uses) == len(part.biases) == self._norms[target] else None


def _overlap(one: Place, other: Place) -> bool:
    """Whether two parts of one memory may share elements."""
    (begin, end), (start, stop) = _reach(one), _reach(other)
    return begin < stop and start < end


def _reach(place: Place) -> tuple[int, int]:
    _, offset, shape, strides = place
    return offset, offset + 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))


def running_mean_of(func: Any, args: tuple[Any, ...], tensor: Tensor) -> Place | None:
    """The running mean that an op subtracts from a tensor, if it is a batch norm in eval mode."""
    if func not in _NORMS or args[0] is not tensor or args[3] is None or (func not in _ALWAYS_EVAL and args[5]):
        return None
    return place_of(args[3])


_aten = torch.ops.aten
_ALWAYS_EVAL = {_aten._native_batch_norm_legit_no_training.default, _aten._batch_norm_no_update.default}
_NORMS = _ALWAYS_EVAL | {
    _aten.native_batch_norm.default, _aten._native_batch_norm_legit.default, _aten.cudnn_batch_norm.default,
    _aten.miopen_batch_norm.default,
}  # fmt: skip
