"""Compute the result shapes of common ATen calls on tensors without data, faster than PyTorch does.

PyTorch decomposes a batch norm or an activation on such tensors into a dozen calls, and decides at each call on a fake
tensor what kind of call it is. That took most of the time of recording a forward. Here the usual calls on usual tensors
are computed from their shapes. All else is left to PyTorch. Recordings and the dry run both use this.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._prims_common import suggest_memory_format
from torch._subclasses.fake_tensor import (
    FakeTensor,
    FakeTensorMode,
    in_kernel_invocation_manager,
    unset_fake_temporarily,
)
from torch.utils._python_dispatch import TorchDispatchMode

_SINGLE_OR_DOUBLE = (torch.float32, torch.float64)


def _alike(*tensors: Any) -> bool:
    """Whether they are contiguous floating-point tensors of one dtype."""
    return all(
        isinstance(tensor, Tensor) and tensor.dtype == tensors[0].dtype and tensor.is_contiguous() for tensor in tensors
    ) and tensors[0].is_floating_point()  # fmt: skip


def _new(x: Tensor, shape: Any) -> Tensor:
    """A contiguous meta tensor of this shape, with the dtype of `x`."""
    return torch.empty(shape, dtype=x.dtype, device="meta")


def _like(x: Tensor) -> Tensor:
    return _new(x, x.shape) if x.is_contiguous() else torch.empty_like(x)


def _spreads(shape: torch.Size, over: torch.Size) -> bool:
    """Whether a tensor of `shape` broadcasts to exactly the shape `over`."""
    pairs = zip(reversed(shape), reversed(over), strict=False)
    return len(shape) <= len(over) and all(length in (1, whole) for length, whole in pairs)


def _batch_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor | None, variance: Tensor | None,
    training: bool, momentum: float, eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Results of native_batch_norm: values, and in train mode the batch's mean and inverse standard deviation."""
    channels = x.shape[1]
    for tensor in (weight, bias, mean, variance):
        if tensor is not None and tuple(tensor.shape) != (channels,):
            raise RuntimeError(f"batch norm of {channels} channels with parameters of shape {tuple(tensor.shape)}")
    saved = _new(x, channels if training else 0)
    # Fake tensors have the memory order of `x`. The kernel's result is contiguous or channels_last, and may be viewed.
    form = torch.contiguous_format if x.is_contiguous() else suggest_memory_format(x)
    values = torch.empty(x.shape, dtype=x.dtype, device="meta", memory_format=form)
    return values, saved, saved if saved.numel() == 0 else torch.empty_like(saved)


def _layer_norm(x: Tensor, shape: Sequence[int], weight: Tensor | None, bias: Tensor | None, eps: float) -> Any:
    """Results of native_layer_norm, all contiguous: values, and each position's mean and inverse standard deviation."""
    over = len(x.shape) - len(shape)
    parameters = [tensor for tensor in (weight, bias) if tensor is not None]
    if x.dtype not in _SINGLE_OR_DOUBLE or not all(_alike(tensor) and tensor.dtype == x.dtype for tensor in parameters):
        return NotImplemented
    if any(tuple(tensor.shape[-len(shape) :]) != tuple(shape) for tensor in (x, *parameters)):
        return NotImplemented
    kept = (*x.shape[:over], *(1 for _ in shape))
    return _new(x, x.shape), _new(x, kept), _new(x, kept)


def _convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int], transposed: bool, output_padding: Sequence[int], groups: int,
) -> Any:  # fmt: skip
    if transposed or not _alike(x, weight, *(() if bias is None else (bias,))) or x.dim() != weight.dim():
        return NotImplemented
    samples, channels, *sizes = x.shape
    outputs, inputs, *kernel = weight.shape
    if channels != inputs * groups or outputs % groups or (bias is not None and tuple(bias.shape) != (outputs,)):
        return NotImplemented
    # A list of one number is meant for every dimension; padding="valid" comes as one.
    each = ([*given] * (len(sizes) if len(given) == 1 else 1) for given in (stride, padding, dilation))
    along = zip(sizes, kernel, *each, strict=True)
    lengths = [(size + 2 * pad - step * (taps - 1) - 1) // by + 1 for size, taps, by, pad, step in along]
    return _new(x, (samples, outputs, *lengths)) if min(lengths, default=0) > 0 else NotImplemented


def _addmm(bias: Tensor, rows: Tensor, columns: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    shape = (rows.shape[0], columns.shape[1])
    if rows.shape[1] != columns.shape[0] or torch.broadcast_shapes(bias.shape, shape) != shape:
        raise RuntimeError(f"addmm of {tuple(bias.shape)}, {tuple(rows.shape)} and {tuple(columns.shape)}")
    return _new(rows, shape)


def _mm(rows: Tensor, columns: Tensor) -> Tensor:
    """torch has no shapes of a sparse matrix's product with a dense one."""
    if rows.layout is torch.strided or columns.layout is not torch.strided or rows.shape[1] != columns.shape[0]:
        return torch.mm(rows, columns)
    return _new(columns, (rows.shape[0], columns.shape[1]))


def _grouped_mm(
    rows: Tensor, kernels: Tensor, ends: Tensor | None = None, bias: Tensor | None = None, dtype: Any = None
) -> Any:
    """Rows (S, k) in groups, each multiplied by its own one of the kernels (groups, k, n). torch knows it in half
    precision only."""
    if rows.dtype not in _SINGLE_OR_DOUBLE or rows.dim() != 2 or kernels.dim() != 3 or dtype not in (None, rows.dtype):
        return NotImplemented
    if rows.shape[1] != kernels.shape[1] or (ends is not None and len(ends) != len(kernels)):
        raise RuntimeError(f"rows of shape {tuple(rows.shape)} for kernels of shape {tuple(kernels.shape)}")
    length, of_16_bytes = kernels.shape[2], 16 // rows.element_size()
    stride = -(-length // of_16_bytes) * of_16_bytes
    return torch.empty_strided((rows.shape[0], length), (stride, 1), dtype=rows.dtype, device="meta")


def _grid_sampler(x: Tensor, grid: Tensor, mode: int, padding: int, align_corners: bool) -> Any:
    """Maps (N, C, ...) sampled where a grid (N, ..., number of coordinates) says."""
    fits = x.dim() == grid.dim() == 4 and x.shape[0] == grid.shape[0] and grid.shape[-1] == 2 and x.numel()
    if not fits or not _alike(x) or grid.dtype != x.dtype or x.dtype not in _SINGLE_OR_DOUBLE:
        return NotImplemented
    return _new(x, (*x.shape[:2], *grid.shape[1:3]))


def _safe_softmax(x: Tensor, dim: int, dtype: torch.dtype | None = None) -> Any:
    return _like(x) if _alike(x) and dtype is None and -x.dim() <= dim < x.dim() else NotImplemented


def _of_one(x: Tensor, *settings: Any, **options: Any) -> Any:
    return _like(x) if x.is_floating_point() else NotImplemented


def _of_one_in_place(x: Tensor, *settings: Any, **options: Any) -> Any:
    return x if x.is_floating_point() else NotImplemented


def _of_two(x: Any, y: Any, *, alpha: float = 1) -> Any:
    if isinstance(y, (int, float)) and isinstance(x, Tensor):
        return _of_one(x)
    if not _alike(x, y):
        return NotImplemented
    if _spreads(y.shape, x.shape):
        return _like(x)
    return _like(y) if _spreads(x.shape, y.shape) else NotImplemented


def _of_two_in_place(x: Tensor, y: Any, *, alpha: float = 1) -> Any:
    if isinstance(y, (int, float)):
        return _of_one_in_place(x)
    return x if _alike(x, y) and _spreads(y.shape, x.shape) else NotImplemented


def _mean(x: Tensor, dims: Sequence[int] | None, keepdim: bool = False, *, dtype: torch.dtype | None = None) -> Any:
    if not _alike(x) or not dims or dtype is not None:
        return NotImplemented
    gone = {dim % x.dim() for dim in dims if -x.dim() <= dim < x.dim()}
    if len(gone) != len(dims):
        return NotImplemented
    kept = [1 if dim in gone else length for dim, length in enumerate(x.shape)]
    return _new(x, kept if keepdim else [length for dim, length in enumerate(x.shape) if dim not in gone])


def _cat(tensors: Sequence[Tensor], dim: int = 0) -> Any:
    first = tensors[0]
    if not _alike(*tensors) or not -first.dim() <= dim < first.dim() or any(not tensor.numel() for tensor in tensors):
        return NotImplemented
    dim %= first.dim()
    others = {(*tensor.shape[:dim], *tensor.shape[dim + 1 :]) for tensor in tensors}
    if len(others) != 1 or any(tensor.dim() != first.dim() for tensor in tensors):
        return NotImplemented
    return _new(first, (*first.shape[:dim], sum(tensor.shape[dim] for tensor in tensors), *first.shape[dim + 1 :]))


def _empty(
    size: Sequence[int], *, dtype: torch.dtype | None = None, layout: torch.layout | None = None,
    device: torch.device | None = None, **others: Any,
) -> Any:  # fmt: skip
    plain = dtype is not None and device is not None and layout in (None, torch.strided) and not others
    return torch.empty(size, dtype=dtype, device="meta") if plain else NotImplemented


_aten = torch.ops.aten

META_KERNELS: Mapping[Any, Callable[..., Any]] = {
    _aten.native_batch_norm.default: _batch_norm,
    _aten.native_layer_norm.default: _layer_norm,
    _aten.convolution.default: _convolution,
    _aten.empty.memory_format: _empty,
    _aten.addmm.default: _addmm,
    _aten.mm.default: _mm,
    _aten._grouped_mm.default: _grouped_mm,
    _aten.cat.default: _cat,
    _aten.mean.dim: _mean,
    _aten._safe_softmax.default: _safe_softmax,
    _aten.grid_sampler_2d.default: _grid_sampler,
    **dict.fromkeys(
        (_aten.elu.default, _aten.exp.default, _aten.gelu.default, _aten.hardsigmoid.default, _aten.hardswish.default,
         _aten.hardtanh.default, _aten.leaky_relu.default, _aten.mish.default, _aten.pow.Tensor_Scalar,
         _aten.relu.default, _aten.rsqrt.default, _aten.sigmoid.default, _aten.silu.default, _aten.sqrt.default,
         _aten.tanh.default), _of_one
    ),
    **dict.fromkeys(
        (_aten.elu_.default, _aten.gelu_.default, _aten.hardsigmoid_.default, _aten.hardswish_.default,
         _aten.hardtanh_.default, _aten.leaky_relu_.default, _aten.mish_.default, _aten.relu_.default,
         _aten.sigmoid_.default, _aten.silu_.default, _aten.tanh_.default), _of_one_in_place
    ),
    **dict.fromkeys((_aten.add.Tensor, _aten.div.Tensor, _aten.mul.Tensor, _aten.sub.Tensor), _of_two),
    **dict.fromkeys((_aten.add_.Tensor, _aten.div_.Tensor, _aten.mul_.Tensor, _aten.sub_.Tensor), _of_two_in_place),
}  # fmt: skip
"""Shape computations by op. Each returns `NotImplemented` for arguments that it doesn't cover."""

META_OPS = frozenset(
    (_aten._softmax.default, _aten._unsafe_view.default, _aten.bmm.default, _aten.clone.default,
     _aten.expand.default, _aten.permute.default, _aten.select.int,
     _aten.slice.Tensor, _aten.split.Tensor, _aten.split_with_sizes.default, _aten.squeeze.dim, _aten.t.default,
     _aten.transpose.int, _aten.unbind.int, _aten.unsqueeze.default, _aten.view.default)
)  # fmt: skip
"""Ops whose own meta kernels are fast; PyTorch's dispatch of fake tensors is skipped for them."""


_ATTRIBUTES = "_attributes_of_fake_tensors"


def fake_over(mode: FakeTensorMode, data: Tensor, device: torch.device) -> Tensor:
    """As `FakeTensor(mode, data, device)`, in a fifth of its time.

    The attributes of the first fake tensor of a device are noted on the mode, and the next ones get the same.
    """
    known = mode.__dict__.setdefault(_ATTRIBUTES, {})
    if device not in known:
        made = FakeTensor(mode, data, device)
        known[device] = dict(vars(made))
        return made
    fake = Tensor._make_subclass(  # type: ignore[attr-defined]
        FakeTensor, data, data.requires_grad, dispatch_device=True, device_for_backend_keys=device
    )
    torch._C._set_throw_on_mutable_data_ptr(fake)
    fake.__dict__.update(known[device])
    return fake


def fakify(mode: FakeTensorMode, tensor: Tensor) -> Tensor:
    """A fake tensor for this tensor: `FakeTensorMode.from_tensor`, faster for plain tensors."""
    plain = type(tensor) in (Tensor, nn.Parameter) and tensor.layout is torch.strided and tensor.is_contiguous()
    if not plain or tensor.is_quantized or tensor.is_complex() or tensor._is_view():
        return mode.from_tensor(tensor)
    data = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta", requires_grad=tensor.requires_grad)
    fake = fake_over(mode, data, tensor.device)
    if isinstance(tensor, nn.Parameter):
        fake._is_param = True
    return fake


KNOWN_ELEMENTS = 1024
"""A forward may ask for the values of constants up to this number of elements."""


def constant(mode: FakeTensorMode, tensor: Tensor) -> Tensor:
    """A fake tensor for one that is not a parameter, buffer or input: a plain attribute of a module, say.

    Up to `KNOWN_ELEMENTS` elements it keeps its values, so a forward can take a number from it (`strides[0]`).
    """
    if tensor.numel() > KNOWN_ELEMENTS or type(tensor) is not Tensor or tensor.layout is not torch.strided:
        return mode.from_tensor(tensor)
    with unset_fake_temporarily():
        own = tensor.detach()
    return mode.fake_tensor_converter.from_real_tensor(mode, own, make_constant=True)


def run_on_fakes(mode: FakeTensorMode, op: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Run an ATen call on fake tensors."""
    if op is torch.ops.prim.device.default and isinstance(args[0], FakeTensor):
        return args[0].fake_device
    kernel = META_KERNELS.get(op)
    if kernel is not None or op in META_OPS:
        device = kwargs.get("device") or _only_device(args)
        if device is not None:
            with in_kernel_invocation_manager(mode):
                out = (kernel or op)(*args, **kwargs)
            if isinstance(out, Tensor):
                return _wrapped(mode, out, device)
            if out is not NotImplemented:
                wrapped = {id(one): _wrapped(mode, one, device) for one in out}
                return type(out)(wrapped[id(one)] for one in out)
    return op(*args, **kwargs)


def _wrapped(mode: FakeTensorMode, tensor: Tensor, device: torch.device) -> Tensor:
    return tensor if isinstance(tensor, FakeTensor) else fake_over(mode, tensor, device)


def _only_device(args: tuple[Any, ...]) -> torch.device | None:
    """The one device that all tensors are on; None if there are several, or if a tensor has values."""
    device = None
    for tensor in _tensors(args):
        if not isinstance(tensor, FakeTensor) or tensor.constant is not None:
            return None
        if device is not None and tensor.fake_device != device:
            return None
        device = tensor.fake_device
    return device


def has_real(args: Sequence[Any]) -> bool:
    """Whether any tensor among a call's arguments has data."""
    return any(not isinstance(tensor, FakeTensor) for tensor in _tensors(args))


def _tensors(args: Sequence[Any]) -> Iterator[Tensor]:
    for arg in args:
        if isinstance(arg, Tensor):
            yield arg
        elif isinstance(arg, (list, tuple)):
            yield from (item for item in arg if isinstance(item, Tensor))


class MetaMode(TorchDispatchMode):
    """Inside, forwards run on meta tensors with the kernels of this file."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kernel = META_KERNELS.get(func)
        out = NotImplemented if kernel is None else kernel(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {})) if out is NotImplemented else out
