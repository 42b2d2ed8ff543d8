"""torch.nn.MultiheadAttention written out in calls that torch.fx can trace and whose sizes can be rewritten.

Its own forward passes everything to one function, which requires the embedding to be a multiple of the number of heads.
Here the width of a head is fixed, and the number of heads follows from the rows of the kernels. The module is traced as
written here, and runs this forward once anything in it is removed. So is code that calls that function by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import handle_torch_function, has_torch_function

HINTS = {
    nn.MultiheadAttention: {"is_causal"},
    nn.TransformerEncoderLayer: {"is_causal"},
    nn.TransformerDecoderLayer: {"tgt_is_causal", "memory_is_causal"},
}
"""Arguments of torch's layers that say whether a mask is causal; these layers only pass them on, to `attend`."""


class _Kernels(NamedTuple):
    """The weights and biases of queries, keys and values, and of the output; one key and value more."""

    weights: Sequence[Any]
    biases: Sequence[Tensor | None]
    more_key: Tensor | None
    more_value: Tensor | None
    output: Tensor
    output_bias: Tensor | None


def multi_head_attention(
    self: nn.MultiheadAttention, query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None = None,
    need_weights: bool = True, attn_mask: Tensor | None = None, average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """The forward of `torch.nn.MultiheadAttention`, with the arguments and results of its documentation."""
    own = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
    kernels = _Kernels(
        own if self.in_proj_weight is None else self.in_proj_weight.chunk(3), _in_three(self.in_proj_bias), self.bias_k,
        self.bias_v, self.out_proj.weight, self.out_proj.bias,
    )  # fmt: skip
    batch_first = query.dim() == 3 and self.batch_first
    if batch_first:
        query, key, value = query.transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1)
    output, weights = _attention(
        query, key, value, self.head_dim, kernels, self.add_zero_attn, self.dropout if self.training else 0.0,
        key_padding_mask, attn_mask, is_causal, need_weights, average_attn_weights,
    )  # fmt: skip
    return output.transpose(0, 1) if batch_first else output, weights


def multi_head_attention_forward(
    query: Tensor, key: Tensor, value: Tensor, embed_dim_to_check: int, num_heads: int, in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None, bias_k: Tensor | None, bias_v: Tensor | None, add_zero_attn: bool, dropout_p: float,
    out_proj_weight: Tensor, out_proj_bias: Tensor | None, training: bool = True,
    key_padding_mask: Tensor | None = None, need_weights: bool = True, attn_mask: Tensor | None = None,
    use_separate_proj_weight: bool = False, q_proj_weight: Tensor | None = None, k_proj_weight: Tensor | None = None,
    v_proj_weight: Tensor | None = None, static_k: None = None, static_v: None = None,
    average_attn_weights: bool = True, is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """`F.multi_head_attention_forward`, with the arguments and results of its documentation."""
    own: Any = (q_proj_weight, k_proj_weight, v_proj_weight)
    if not use_separate_proj_weight and in_proj_weight is not None:
        own = in_proj_weight.chunk(3)
    kernels = _Kernels(own, _in_three(in_proj_bias), bias_k, bias_v, out_proj_weight, out_proj_bias)
    return _attention(
        query, key, value, int(embed_dim_to_check) // int(num_heads), kernels, add_zero_attn,
        dropout_p if training else 0.0, key_padding_mask, attn_mask, is_causal, need_weights, average_attn_weights,
    )  # fmt: skip


def written_out_call(function: Any, kwargs: Mapping[str, Any]) -> Callable[..., Any] | None:
    """What is traced instead of a call of torch's function, or None: static keys and values aren't written out."""
    static = (kwargs.get(name) for name in ("static_k", "static_v"))
    is_written = function is F.multi_head_attention_forward and all(one is None for one in static)
    return multi_head_attention_forward if is_written else None


def _in_three(biases: Tensor | None) -> Sequence[Tensor | None]:
    return (None, None, None) if biases is None else biases.chunk(3)


def _attention(
    query: Tensor, key: Tensor, value: Tensor, head_dim: int, kernels: _Kernels, add_zero_attn: bool, dropout: float,
    key_padding_mask: Tensor | None, attn_mask: Tensor | None, is_causal: bool, need_weights: bool,
    average_attn_weights: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Attention of queries (L, N, E) or (L, E) to keys and values (S, N, E) or (S, E), all heads `head_dim` wide."""
    batched = query.dim() == 3
    if not batched:
        query, key, value = query.unsqueeze(1), key.unsqueeze(1), value.unsqueeze(1)
        key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
    query, key, value = (
        F.linear(x.transpose(0, 1), weight, bias)
        for x, weight, bias in zip((query, key, value), kernels.weights, kernels.biases, strict=True)
    )
    added = 0
    if kernels.more_key is not None and kernels.more_value is not None:
        key = torch.cat([key, kernels.more_key.expand(key.shape[0], -1, -1)], 1)
        value = torch.cat([value, kernels.more_value.expand(value.shape[0], -1, -1)], 1)
        added += 1
    if add_zero_attn:
        key, value, added = F.pad(key, (0, 0, 0, 1)), F.pad(value, (0, 0, 0, 1)), added + 1
    query, key, value = (x.unflatten(2, (-1, head_dim)).transpose(1, 2) for x in (query, key, value))
    mask = _mask(attn_mask, key_padding_mask, query, added)
    weights = None
    if need_weights:
        scores = (query * head_dim**-0.5) @ key.transpose(2, 3)
        weights = (scores if mask is None else scores + mask).softmax(-1)
        weights = F.dropout(weights, dropout) if dropout > 0.0 else weights
        heads = weights @ value
        weights = weights.mean(1) if average_attn_weights else weights
        weights = weights if batched else weights.squeeze(0)
    else:
        hinted = key_padding_mask is None and added == 0
        heads = attend(query, key, value, mask, dropout, is_causal if hinted else False)
    output = F.linear(heads.transpose(1, 2).flatten(2), kernels.output, kernels.output_bias).transpose(0, 1)
    return output if batched else output.squeeze(1), weights


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float, causal: bool) -> Tensor:
    """Scaled dot-product attention that takes no mask where it is told that the mask is causal.

    It is one call in a trace, which so holds for both: `nn.TransformerEncoder` finds out from the mask's values.
    """
    if has_torch_function((query, key, value)):
        return handle_torch_function(attend, (query, key, value), query, key, value, mask, dropout, causal)
    return F.scaled_dot_product_attention(query, key, value, None if causal else mask, dropout, causal)


def _mask(attention: Tensor | None, padding: Tensor | None, query: Tensor, added: int) -> Tensor | None:
    """Both masks as one to add to scores, shape (N or 1, heads or 1, L or 1, S), extended for `added` keys."""
    masks = []
    if attention is not None:
        mask = _to_add(attention, query)
        masks.append(mask if mask.dim() == 2 else mask.unflatten(0, (query.shape[0], -1)))
    if padding is not None:
        masks.append(_to_add(padding, query)[:, None, None])
    if not masks:
        return None
    return F.pad(sum(masks[1:], masks[0]), (0, added)) if added else sum(masks[1:], masks[0])


def _to_add(mask: Tensor, like: Tensor) -> Tensor:
    if mask.dtype != torch.bool:
        return mask.to(like.dtype)
    return torch.zeros_like(mask, dtype=like.dtype).masked_fill(mask, float("-inf"))
