"""torch's transformer layers without their fused kernels, which read parameters past the submodules.

`nn.TransformerEncoder` has one more fast path: in eval mode without gradients it packs a padded batch into a nested
tensor, and unpacks it with zeros at the padded positions. Nested tensors run through the fused kernel only, so the
packing is left out, and a hook writes what the padded positions would have got.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from rewriters.recording import modules_of
from rewriters.undo_log import UndoLog


def disable_fused_layers(model: nn.Module, undo_log: UndoLog) -> None:
    """Make torch's transformer layers call their submodules instead of a fused kernel that reads their parameters."""
    for module in modules_of(model):
        if isinstance(module, nn.TransformerEncoder):
            if module.use_nested_tensor and type(module).forward is nn.TransformerEncoder.forward:
                _hook_first(module, undo_log)
            undo_log.set_attribute(module, "use_nested_tensor", False)
        elif isinstance(module, nn.TransformerEncoderLayer):
            undo_log.set_attribute(module, "activation_relu_or_gelu", 0)


def _hook_first(encoder: nn.TransformerEncoder, undo_log: UndoLog) -> None:
    """Register the hook in front of the caller's own, which see what they saw before."""
    hooks: Any = encoder._forward_hooks  # an OrderedDict
    handle = RemovableHandle(hooks, extra_dict=encoder._forward_hooks_with_kwargs)
    undo_log.set(encoder._forward_hooks_with_kwargs, handle.id, True)
    undo_log.set(hooks, handle.id, fill_padding)
    hooks.move_to_end(handle.id, last=False)


def fill_padding(
    encoder: nn.TransformerEncoder, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Tensor
) -> Tensor | None:
    """A forward hook: where the encoder would have run on a nested tensor, write what it returns for padding.

    The last layer's output has zeros there, which a norm behind it turns into what it makes of zeros.

    Args:
        encoder: its `use_nested_tensor` was True.
        args, kwargs: what it was called with.
        output: of shape (N, L, E).

    Returns:
        The output with other values at padded positions; None to leave it.
    """
    padding = _padding_of_nested(encoder, *args, **kwargs)
    if padding is None:
        return None
    zeros = torch.zeros_like(output)
    return torch.where(padding[..., None], zeros if encoder.norm is None else encoder.norm(zeros), output)


def _padding_of_nested(
    encoder: nn.TransformerEncoder, src: Tensor, mask: Tensor | None = None,
    src_key_padding_mask: Tensor | None = None, is_causal: bool | None = None,
) -> Tensor | None:  # fmt: skip
    """Which positions are padded, bool of shape (N, L); None if torch would not make a nested tensor of this call."""
    first: Any = encoder.layers[0]
    if src_key_padding_mask is None:
        return None
    ruled_out = (
        not torch.backends.mha.get_fastpath_enabled()
        or first.training
        or src.dim() != 3
        or mask is not None
        or torch.is_autocast_enabled()
        or (encoder.mask_check and torch.compiler.is_compiling())
        or (torch.is_grad_enabled() and any(x.requires_grad for x in (src, *first.parameters())))
    )
    if ruled_out:
        return None
    # As torch does: a mask of floats is one to add, where zero lets a position through.
    padding = src_key_padding_mask if src_key_padding_mask.dtype == torch.bool else src_key_padding_mask != 0
    if encoder.mask_check and not torch._nested_tensor_from_mask_left_aligned(src, padding.logical_not()):
        return None
    return padding
