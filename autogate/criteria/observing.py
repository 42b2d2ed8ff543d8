"""Look at what kernels with gates are called with, while a model runs.

Every convolution and matrix product passes a dispatch mode. It knows a kernel by its memory, so layers, functional
calls and attention modules are seen alike. A kernel that is computed in the forward (weight standardisation, say) is
not seen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from rewriters import ChannelMap, Side

Tell = Callable[[Side, Tensor, Tensor], None]
"""Called with a gated side, the indices along it that a call reads, and what it reads: shape (rows, indices)."""


class _Known(NamedTuple):
    side: Side
    weight: nn.Parameter


class Call(NamedTuple):
    """A call that sums over channels.

    Attributes:
        kernel: its kernel operand.
        dim: the dimension of the kernel that is summed over.
        reads: of how many indices along it a call reads, the inputs, not copied: shape (..., indices).
        bias: what is added to the outputs, if anything.
        output: the dimension of the kernel that the outputs' channels lie along; None where an output may be a sum of
            several parts, as in a transposed convolution, or where outputs aren't the call's last or second dimension.
    """

    kernel: Tensor
    dim: int
    reads: Callable[[int], Tensor]
    bias: Tensor | None = None
    output: int | None = None


class Seen(NamedTuple):
    """A call of a gated kernel, and the indices along the gated side that it reads."""

    side: Side
    indices: Tensor
    call: Call


class GatedCalls:
    """Recognises calls of a model's gated kernels among ATen ops.

    Args:
        model: the model.
        channel_map: its gated sides.
    """

    def __init__(self, model: nn.Module, channel_map: ChannelMap):
        self._known: dict[int, list[_Known]] = {}
        for side in channel_map.gated:
            weight = model.get_parameter(side.tensor)
            self._known.setdefault(weight.untyped_storage().data_ptr(), []).append(_Known(side, weight))

    def __contains__(self, tensor: Tensor) -> bool:
        """Whether a tensor lies in the memory of a gated kernel."""
        return tensor.untyped_storage().data_ptr() in self._known

    def of(self, func: Any, args: tuple[Any, ...]) -> Iterator[Seen]:
        """The gated kernels that an op reads."""
        read = _CALLS.get(func)
        for call in read(args) if read is not None else ():
            for known in self._known.get(call.kernel.untyped_storage().data_ptr(), ()):
                if call.kernel.stride(call.dim) == known.weight.stride(known.side.dim):
                    with torch.utils._python_dispatch._disable_current_modes():
                        index = _indices(known, call)
                    yield Seen(known.side, index, call)


class Observer(TorchDispatchMode):
    """While active, tells what the gated kernels of a model are called with.

    Args:
        model: the model.
        channel_map: its gated sides.
        tell: called for each call of a gated kernel.
    """

    def __init__(self, model: nn.Module, channel_map: ChannelMap, tell: Tell):
        super().__init__()
        self._tell = tell
        self._calls = GatedCalls(model, channel_map)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for side, index, call in self._calls.of(func, args):
            with torch.utils._python_dispatch._disable_current_modes():
                self._tell(side, index, call.reads(len(index)).reshape(-1, len(index)))
        return func(*args, **(kwargs or {}))


def _indices(known: _Known, call: Call) -> Tensor:
    """The indices along the gated side that a kernel operand, perhaps a part of the parameter, has."""
    weight, stride = known.weight, known.weight.stride(known.side.dim)
    begin = (call.kernel.storage_offset() - weight.storage_offset()) // stride % weight.shape[known.side.dim]
    return torch.arange(begin, begin + call.kernel.shape[call.dim], device=weight.device)


def _convolution(args: tuple[Any, ...]) -> list[Call]:
    x, kernel, transposed = args[0], args[1], args[6]

    def reads(length: int) -> Tensor:  # a grouped kernel's input side is as long as one group
        return x.reshape(len(x), -1, length, *x.shape[2:]).movedim(2, -1)

    if transposed:
        return [Call(kernel, 0, reads)]
    return [Call(kernel, 1, reads, args[2], output=0)]


def _product(left: Tensor, right: Tensor, bias: Tensor | None = None) -> list[Call]:
    """Either operand may be the kernel; one that is batched must be the same for all of the batch."""
    calls = []
    if right.ndim == 2 or right.shape[0] == 1 or right.stride(0) == 0:
        kernel = right if right.ndim == 2 else right[0]
        calls.append(Call(kernel, 0, lambda _: left, bias, output=1))
    if left.ndim == 2 or left.shape[0] == 1 or left.stride(0) == 0:
        kernel = left if left.ndim == 2 else left[0]
        calls.append(Call(kernel, 1, lambda _: right.mT))
    return calls


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Call:
    return Call(weight, 1, lambda _: x, bias, output=0)


_aten = torch.ops.aten
_CALLS: Mapping[Any, Callable[[tuple[Any, ...]], list[Call]]] = {
    _aten.convolution.default: _convolution,
    _aten.mm.default: lambda args: _product(args[0], args[1]),
    _aten.bmm.default: lambda args: _product(args[0], args[1]),
    _aten.addmm.default: lambda args: _product(args[1], args[2], args[0]),
    _aten.baddbmm.default: lambda args: _product(args[1], args[2], args[0]),
    _aten.linear.default: lambda args: [_linear(*args)],
}
