"""Module fields that follow when the shapes of a module's tensors change.

Convolutions, linear layers, recurrent layers and attention have such fields. `normalized_shape`, `num_channels` and
`num_groups` of norms follow the norm's vectors; an instance norm without tensors has only its field
(`widths_of_bare_norms`). Attributes in which other modules hold sizes are found by their use (`analysis/own_code.py`).
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.utils.parametrize import ParametrizationList

from rewriters.analysis import Analysis
from rewriters.forwards import LabelMask
from rewriters.labelling.rules import mixing
from rewriters.recording import modules_of, named_modules, tensors_of
from rewriters.undo_log import UndoLog


def _is_convolution(module: nn.Module, shape: torch.Size) -> bool:
    """Whether a module has the fields of a convolution. torchvision's deformable convolution is not a `_ConvNd`."""
    if isinstance(module, nn.modules.conv._ConvNd):
        return True
    widths: list[Any] = [vars(module).get(name) for name in ("out_channels", "in_channels", "groups")]
    outputs, inputs, groups = widths
    return all(type(width) is int for width in widths) and shape[:2] == (outputs, inputs // groups)


def fields_after(
    module: nn.Module, name: str, old: torch.Size, new: torch.Size, whole_groups: bool
) -> Iterator[tuple[str, Any]]:
    """(field, value) pairs of a module that follow from the new shape of one of its tensors.

    Args:
        module: has the fields.
        name: the tensor's name in the module.
        old: its shape before.
        new: its shape now.
        whole_groups: a grouped convolution loses whole groups, not the same positions in every group.
    """
    if name == "weight" and _is_convolution(module, old):
        transposed = getattr(module, "transposed", False)
        first, second = ("in_channels", "out_channels") if transposed else ("out_channels", "in_channels")
        groups: int = vars(module)["groups"]
        if groups > 1 and whole_groups:
            groups = new[0] * groups // old[0]
            yield "groups", groups
        yield first, new[0]
        yield second, new[1] * groups
    elif isinstance(module, nn.Linear) and name == "weight":
        yield "out_features", new[0]
        yield "in_features", new[1]
    elif isinstance(module, nn.modules.batchnorm._NormBase) and name in ("weight", "running_mean"):
        yield "num_features", new[0]
    elif isinstance(module, nn.RNNBase) and name == "weight_ih_l0":
        yield "input_size", new[1]
    elif isinstance(module, nn.RNNBase) and name == "weight_hh_l0":
        yield "hidden_size", new[1]
    elif isinstance(module, nn.modules.rnn.RNNCellBase) and name in ("weight_ih", "weight_hh"):
        yield "input_size" if name == "weight_ih" else "hidden_size", new[1]
    elif isinstance(module, nn.MultiheadAttention) and name == "in_proj_weight":
        yield "num_heads", module.num_heads * new[0] // old[0]
        yield from ((width, new[1]) for width in ("embed_dim", "kdim", "vdim"))
    elif isinstance(module, nn.MultiheadAttention) and name == "q_proj_weight":
        yield "num_heads", module.num_heads * new[0] // old[0]
        yield "embed_dim", new[1]
    elif isinstance(module, nn.MultiheadAttention) and name in ("k_proj_weight", "v_proj_weight"):
        yield f"{name[0]}dim", new[1]
    elif isinstance(module, nn.PReLU):
        yield "num_parameters", new[0]
    elif isinstance(module, nn.GroupNorm) and name == "weight":
        if mixing.normalises_whole_groups(module.num_groups, old[0]):
            yield "num_groups", module.num_groups * new[0] // old[0]
        yield "num_channels", new[0]
    elif name == "weight" and tuple(getattr(module, "normalized_shape", ())) == tuple(old):
        yield "normalized_shape", tuple(new)


def owner_of(model: nn.Module, name: str, module: nn.Module, own_name: str) -> tuple[nn.Module, str]:
    """The module whose fields follow a tensor's shape, and the tensor's name in it.

    For a kernel under a parametrization, or under the older `torch.nn.utils.weight_norm`, it is the layer, and the
    kernel's name in it.
    """
    if own_name.endswith("_v") and own_name.removesuffix("_v") + "_g" in module._parameters:
        return module, own_name.removesuffix("_v")
    if isinstance(module, ParametrizationList):
        originals = [
            tensor for key, tensor in module._parameters.items() if tensor is not None and key.startswith("original")
        ]
        if getattr(module, own_name).shape == max((one.shape for one in originals), key=torch.Size.numel):
            layer, _, attribute = name.rpartition(".")[0].rpartition(".parametrizations.")
            return model.get_submodule(layer), attribute
    return module, own_name


def refresh_flat_weights(model: nn.Module, undo_log: UndoLog) -> None:
    """Update the lists in which recurrent modules hold their own tensors (`_flat_weights`)."""
    for module in modules_of(model):
        if isinstance(module, nn.RNNBase):
            tensors = [getattr(module, name, None) for name in module._flat_weights_names]
            undo_log.set_attribute(module, "_flat_weights", tensors)
            references = [None if tensor is None else weakref.ref(tensor) for tensor in tensors]
            undo_log.set_attribute(module, "_flat_weight_refs", references)


def widths_of_bare_norms(model: nn.Module, analysis: Analysis, mask: LabelMask) -> dict[str, dict[str, int]]:
    """Fields of instance norms without tensors, by path: nothing else says how many channels are left to them.

    A norm that is called for several widths is left out.
    """
    norms = {path: module for path, module in named_modules(model) if isinstance(module, _InstanceNorm)}
    bare = {path for path, norm in norms.items() if not [*norm.parameters(), *norm.buffers()]}
    known = analysis.labelling.by_tensor() if bare else {}
    found: dict[str, set[int]] = {}
    for call in (call for captured in analysis.captures for call in captured.calls() if call.path in bare):
        x = tensors_of((call.args, call.kwargs))[0]
        dim = x.ndim - norms[call.path]._get_no_batch_dim()
        found.setdefault(call.path, set()).add(mask.shape(known[id(x)])[dim])
    return {path: {"num_features": widths.pop()} for path, widths in found.items() if len(widths) == 1}
