"""Statistics over the live channels only: norms, means and variances as the slim model will take them.

If n of C channels are live, the slim model's layer norm is a layer norm over those n, and the gated model's has to be
the same. Each module here makes such a call while gates train. It holds which channels are live. While all are, it
makes the plain call, so a model that was only prepared gives the same bits as before.

Let m be the mean of the live channels and v their variance. With m at the dead channels, the mean over all C is m and
the variance is n / C v. And (x - m) / sqrt(v + eps) is sqrt(n / C) (x - m) / sqrt(n / C v + n / C eps). So the plain
fused norm, with its eps scaled by n / C and its weight by sqrt(n / C), gives the live norm at every live channel. For
group norms the same holds group by group, for RMS norms with zeros at the dead channels.

Forward and backward of a layer norm with dead channels take 2.0 to 2.6 times as long as the plain one's, on one
processor core in eager mode (sizes of a ViT and a ConvNeXt). The formula written out takes 4 to 6.6 times as long.

A class's gate acts on the kernels behind a norm and not on the norm's statistics. These change when the class dies, all
at once, by the share of one channel.

Values at dead channels have to be finite, because they are multiplied by zero here as in every kernel.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_HALF = (torch.float16, torch.bfloat16)


class LiveStatistic(nn.Module):
    """A call that takes a statistic across channels, over the live ones only.

    `live` has 1 for a live channel and 0 for a dead one. It is not part of the state_dict: `write` sets it whenever
    gates are folded. `count` is the number of live channels for eager code. Compiled code reads only the tensor, so
    that a channel's death doesn't recompile it.

    Args:
        size: number of channels.
        dim: the dimension that they lie along, counted from the last (-1).
        like: a tensor with the device and floating-point dtype of `live`.
    """

    live: Tensor

    def __init__(self, size: int, dim: int, like: Tensor):
        super().__init__()
        dtype = torch.float32 if like.dtype in _HALF else like.dtype
        self.register_buffer("live", torch.ones(size, dtype=dtype, device=like.device), persistent=False)
        self.dim, self.count = dim, size

    def write(self, live: Tensor) -> None:
        """Set which channels are live (bool, shape (size,))."""
        with torch.no_grad():
            self.live.copy_(live)
        self.count = int(live.sum())

    def extra_repr(self) -> str:
        return f"{self.count} of {len(self.live)} channels along dimension {self.dim}"

    def plain(self) -> bool:
        """Whether to make the plain call: all channels are live."""
        return not torch.compiler.is_compiling() and self.count == len(self.live)

    def share(self) -> float | Tensor:
        """n / C, where n is at least 1."""
        if torch.compiler.is_compiling():
            count = self.live.sum(dtype=torch.promote_types(self.live.dtype, torch.float32))
            return count.clamp(min=1) / len(self.live)
        return max(self.count, 1) / len(self.live)

    def along(self, x: Tensor) -> Tensor:
        """`live` in a shape that broadcasts with x."""
        return self.live.to(x.dtype).view(-1, *[1] * (-self.dim - 1))

    def mean(self, x: Tensor, dims: Sequence[int]) -> Tensor:
        """The mean over `dims` of the live channels; the dimensions stay, with size 1."""
        total = _count(x, dims)
        return (x * (self.along(x) / (self.share() * total))).sum(tuple(dims), keepdim=True)

    def filled(self, x: Tensor, dims: Sequence[int]) -> Tensor:
        """x with the mean of the live channels over `dims` at the dead ones."""
        return torch.lerp(x, self.mean(x, dims), 1 - self.along(x))


def _count(x: Tensor, dims: Sequence[int]) -> int:
    """Number of elements along `dims`."""
    count = 1
    for dim in dims:
        count *= x.shape[dim]
    return count


def _scaled(
    norm: Callable[[Tensor, Tensor | None, Tensor | None, float], Tensor],
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, share: float | Tensor,
) -> Tensor:  # fmt: skip
    """The norm of x over its live channels; the dead ones in x have to add nothing to the statistics."""
    root = share**0.5
    if isinstance(share, Tensor):  # eps has to be a number, so x is scaled instead
        x = x / root
    else:
        eps = eps * share
    if weight is None:
        y = norm(x, None, None, eps) * root
        return y if bias is None else y + bias.to(x.dtype)
    return norm(x, weight.to(x.dtype) * root, None if bias is None else bias.to(x.dtype), eps)


def _widened(x: Tensor) -> Tensor:
    """Half precision as single precision, in which the fused norms compute."""
    return x.float() if x.dtype in _HALF else x


def _narrowed(y: Tensor, x: Tensor) -> Tensor:
    """A norm's result in the dtype of the plain norm of x, which autocast widens except on the CPU."""
    widens = x.device.type != "cpu" and torch.is_autocast_enabled(x.device.type)
    return y if widens else y.to(x.dtype)


class LiveLayerNorm(LiveStatistic):
    """`F.layer_norm` over the live channels."""

    def forward(
        self, input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, bias: Tensor | None = None,
        eps: float = 1e-5,
    ) -> Tensor:  # fmt: skip
        if self.plain():
            return F.layer_norm(input, normalized_shape, weight, bias, eps)
        x = self.filled(_widened(input), range(-len(normalized_shape), 0))
        norm = lambda x, w, b, eps: F.layer_norm(x, normalized_shape, w, b, eps)  # noqa: E731
        return _narrowed(_scaled(norm, x, weight, bias, eps, self.share()), input)


class LiveRMSNorm(LiveStatistic):
    """`F.rms_norm` over the live channels."""

    def forward(
        self, input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None
    ) -> Tensor:
        if self.plain():
            return F.rms_norm(input, normalized_shape, weight, eps)
        eps = torch.finfo(input.dtype).eps if eps is None else eps
        x = _widened(input)
        norm = lambda x, w, b, eps: F.rms_norm(x, normalized_shape, w, eps)  # noqa: E731
        return _narrowed(_scaled(norm, x * self.along(x), weight, None, eps, self.share()), input)


class LiveGroupNorm(LiveStatistic):
    """`F.group_norm` where the same positions of every group are live; `live` has an entry for each position."""

    def forward(
        self, input: Tensor, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None,
        eps: float = 1e-5,
    ) -> Tensor:  # fmt: skip
        if self.plain():
            return F.group_norm(input, num_groups, weight, bias, eps)
        x = _widened(input)
        x = self.filled(x.unflatten(1, (num_groups, -1)), range(self.dim, 0)).view_as(x)
        norm = lambda x, w, b, eps: F.group_norm(x, num_groups, w, b, eps)  # noqa: E731
        return _narrowed(_scaled(norm, x, weight, bias, eps, self.share()), input)


class LiveMean(LiveStatistic):
    """`torch.mean` over the live channels."""

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.plain():
            return torch.mean(input, *args, **kwargs)
        return torch.mean(input * self.along(input), *args, **kwargs) / self.share()


class LiveVariance(LiveStatistic):
    """`torch.var`, `torch.std`, `torch.var_mean` or `torch.std_mean` over the live channels."""

    def __init__(self, size: int, dim: int, like: Tensor, name: str):
        super().__init__(size, dim, like)
        self.name = name

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.plain():
            return getattr(torch, self.name)(input, *args, **kwargs)
        dims, correction, keepdim = _variance_arguments(input, *args, **kwargs)
        x = self.filled(input, dims)
        total = _count(x, dims)
        variance, mean = torch.var_mean(x, dims, correction=0, keepdim=keepdim)
        variance = _corrected(variance, total, total * self.share(), correction)
        spread = variance.sqrt() if self.name.startswith("std") else variance
        return (spread, mean) if self.name.endswith("mean") else spread


def _corrected(variance: Tensor, total: int, left: float | Tensor, correction: float) -> Tensor:
    """The variance of `left` of the `total` elements, from that of all, the others of which are at the mean.

    With nothing left to divide by it is what torch gives: NaN for one element, else infinite.
    """
    if isinstance(left, Tensor):
        # One element has no variance, not even by rounding
        return variance * total * (left > 1.5) / (left - correction).clamp(min=0)
    return variance * (0.0 if left < 1.5 else total) / max(left - correction, 0.0)


def _variance_arguments(
    input: Tensor, dim: Any = None, unbiased: bool = True, keepdim: bool = False, *, correction: float | None = None
) -> tuple[tuple[int, ...], float, bool]:
    """Dimensions, correction and keepdim of a call of `torch.var` and similar functions."""
    if isinstance(dim, bool):  # var(unbiased)
        dim, unbiased = None, dim
    dims = [dim] if isinstance(dim, int) else dim or range(input.ndim)
    return tuple(dims), float(unbiased) if correction is None else correction, keepdim


class LiveOperand(LiveStatistic):
    """What a call is given, with zeros for dead channels: they add nothing to a sum, a vector norm, a product."""

    def forward(self, operand: Tensor) -> Tensor:
        return operand if self.plain() else operand * self.along(operand)


class LiveDistance(LiveStatistic):
    """`F.pairwise_distance` over the live channels; at dead ones, too, it would add `eps` to the difference."""

    def forward(self, x1: Tensor, x2: Tensor, p: float = 2.0, eps: float = 1e-6, keepdim: bool = False) -> Tensor:
        if self.plain():
            return F.pairwise_distance(x1, x2, p, eps, keepdim)
        difference = x1 - x2 + eps
        return torch.linalg.vector_norm(difference * self.along(difference), p, -1, keepdim)


class LiveExtreme(LiveStatistic):
    """`torch.amax` or `torch.amin`, or `torch.max` or `torch.min` along a dimension, over the live channels."""

    def __init__(self, size: int, dim: int, like: Tensor, name: str):
        super().__init__(size, dim, like)
        self.name, self.beyond = name, float("-inf") if name.endswith("max") else float("inf")

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not self.plain():
            input = input.masked_fill(self.along(input) == 0, self.beyond)
        return getattr(torch, self.name)(input, *args, **kwargs)


class LiveStandardisation(LiveStatistic):
    """`F.batch_norm` of a kernel of shape (1, out, in), with the mean and variance of each output's live inputs.

    The slim layer standardises what is left of the weight with its own code. A gate on the weight's columns acts on
    them, but not on their share in mean and deviation, which changes when a class dies.

    Qiao et al., "Micro-Batch Training with Batch-Channel Normalization and Weight Standardization", section 3.
    """

    def forward(
        self, input: Tensor, running_mean: None, running_var: None, weight: Tensor | None = None,
        bias: Tensor | None = None, training: bool = False, momentum: float = 0.1, eps: float = 1e-5,
    ) -> Tensor:  # fmt: skip
        def norm(x: Tensor, w: Tensor | None, b: Tensor | None, eps: float) -> Tensor:
            return F.batch_norm(x, running_mean, running_var, w, b, training, momentum, eps)

        if self.plain():
            return norm(input, weight, bias, eps)
        x = _widened(input)
        x = self.filled(x, [dim for dim in range(-x.ndim, 0) if dim != 1 - x.ndim])
        return _narrowed(_scaled(norm, x, weight, bias, eps, self.share()), input)


FORMS: dict[Any, Callable[[int, int, Tensor], LiveStatistic]] = {
    F.layer_norm: LiveLayerNorm,
    **dict.fromkeys([F.rms_norm, torch.rms_norm], LiveRMSNorm),
    F.group_norm: LiveGroupNorm,
    F.batch_norm: LiveStandardisation,
    F.pairwise_distance: LiveDistance,
    **dict.fromkeys([torch.mean, "mean"], LiveMean),
    **dict.fromkeys([torch.var, "var"], partial(LiveVariance, name="var")),
    **dict.fromkeys([torch.std, "std"], partial(LiveVariance, name="std")),
    torch.var_mean: partial(LiveVariance, name="var_mean"),
    torch.std_mean: partial(LiveVariance, name="std_mean"),
    **{
        form: partial(LiveExtreme, name=name)
        for name in ("amax", "amin", "max", "min")
        for form in (name, getattr(torch, name))
    },
}
"""The module that takes a statistic over the live channels, by the function or method name of the traced call."""

ZEROS_ADD_NOTHING = frozenset((
    torch.sum, "sum", torch.nansum, "nansum", torch.count_nonzero, "count_nonzero", torch.norm, "norm",
    torch.linalg.norm, torch.linalg.vector_norm, F.normalize, torch._weight_norm, F.cosine_similarity, torch.cdist,
    torch.renorm, "renorm", F.scaled_dot_product_attention,
    torch.matmul, "matmul", operator.matmul, "__matmul__", torch.bmm, "bmm", torch.mm, "mm", torch.baddbmm, "baddbmm",
    torch.addmm, "addmm", torch.einsum, torch.tensordot, torch.inner, "inner", F.linear, F.conv1d, F.conv2d, F.conv3d,
    F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d,
))  # fmt: skip
"""Calls that are right over the live channels if operands have zeros for the dead ones, by function or method name.

For a kernel that is derived from a parameter, this operand is the kernel; for a convolution along the channels, its
input.
"""
