"""The penalty on saliency scores: an identity whose backward adds the penalty's gradient.

So it needs no place in the user's loss (Chen et al., "Self-Adaptive Network Pruning", equation 9).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

SMOOTHING = 0.95
"""What a backward keeps of the running mean."""


def penalty_gradient(scores: Tensor, push: Tensor, published: bool) -> Tensor:
    """The gradient of the penalty with respect to the scores of one layer, for a loss that is a mean over images.

    Published, it is that of equation 9: push * sum |s| takes scores to zero from both sides, where a channel is
    computed for half of the images, and a negative push opens no channel. Otherwise a positive push takes down the
    scores that are above zero, those that scale an output; a negative one takes up those that are just below.

    Args:
        scores: shape (images, channels).
        push: 0-dim: lambda / N of equation 9.
        published: whether it is equation 9 to the letter.
    """
    if published:
        direction = scores.sign()
    else:
        direction = torch.where(push > 0, scores > 0, (scores > -1) & (scores <= 0)).to(scores.dtype)
    return push * direction / len(scores)


class _Penalised(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scores: Tensor, push: Tensor, level: Tensor, published: bool) -> Tensor:
        ctx.save_for_backward(scores, push)
        ctx.level, ctx.published = level, published
        return scores.view_as(scores)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (grad,), (scores, push) = grads, ctx.saved_tensors
        now = grad.sum(0).square().mean().sqrt().to(ctx.level.dtype)
        known = torch.where(ctx.level > 0, torch.lerp(now, ctx.level, SMOOTHING), now)
        ctx.level.copy_(torch.where(now.isfinite(), known, ctx.level))  # AMP may overflow
        return grad + penalty_gradient(scores, push, ctx.published).to(grad.dtype), None, None, None


def penalised(scores: Tensor, push: Tensor, level: Tensor, published: bool) -> Tensor:
    """The scores as they are; their gradient gets the penalty's on the way back.

    Args:
        scores: of one layer, shape (images, channels).
        push, published: see `penalty_gradient`.
        level: 0-dim; takes the running mean of the root mean square of the channels' gradients, each of which is a sum
            over the images.
    """
    return _Penalised.apply(scores, push, level, published)
