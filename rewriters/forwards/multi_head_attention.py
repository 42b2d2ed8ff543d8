"""torch.nn.MultiheadAttention written out in calls that torch.fx can trace and whose sizes can be rewritten.

Its own forward passes everything to one function, which requires the embedding to be a multiple of the number of heads.
Here the width of a head is fixed, and the number of heads follows from the rows of the kernels. The module is traced as
written here, and runs this forward once anything in it is removed.
"""

from __future__ import annotations

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


def multi_head_attention(
    self: nn.MultiheadAttention, query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None = None,
    need_weights: bool = True, attn_mask: Tensor | None = None, average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """The forward of `torch.nn.MultiheadAttention`, with the arguments and results of its documentation."""
    batched = query.dim() == 3
    if not batched:
        query, key, value = query.unsqueeze(0), key.unsqueeze(0), value.unsqueeze(0)
        key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
    elif not self.batch_first:
        query, key, value = query.transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1)
    if self.in_proj_weight is not None:
        query_weight, key_weight, value_weight = self.in_proj_weight.chunk(3)
    else:
        query_weight, key_weight, value_weight = self.q_proj_weight, self.k_proj_weight, self.v_proj_weight
    query_bias, key_bias, value_bias = (None, None, None) if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
    query = F.linear(query, query_weight, query_bias)
    key = F.linear(key, key_weight, key_bias)
    value = F.linear(value, value_weight, value_bias)
    added = 0
    if self.bias_k is not None and self.bias_v is not None:
        key = torch.cat([key, self.bias_k.expand(key.shape[0], -1, -1)], 1)
        value = torch.cat([value, self.bias_v.expand(value.shape[0], -1, -1)], 1)
        added += 1
    if self.add_zero_attn:
        key, value, added = F.pad(key, (0, 0, 0, 1)), F.pad(value, (0, 0, 0, 1)), added + 1
    query, key, value = (x.unflatten(2, (-1, self.head_dim)).transpose(1, 2) for x in (query, key, value))
    mask = _mask(attn_mask, key_padding_mask, query, added)
    dropout = self.dropout if self.training else 0.0
    weights = None
    if need_weights:
        scores = (query * self.head_dim**-0.5) @ key.transpose(2, 3)
        weights = (scores if mask is None else scores + mask).softmax(-1)
        weights = F.dropout(weights, dropout) if dropout > 0.0 else weights
        heads = weights @ value
        weights = weights.mean(1) if average_attn_weights else weights
        weights = weights if batched else weights.squeeze(0)
    else:
        hinted = key_padding_mask is None and added == 0
        heads = attend(query, key, value, mask, dropout, is_causal if hinted else False)
    output = F.linear(heads.transpose(1, 2).flatten(2), self.out_proj.weight, self.out_proj.bias)
    if not batched:
        return output.squeeze(0), weights
    return output if self.batch_first else output.transpose(0, 1), weights


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
