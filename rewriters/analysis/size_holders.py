"""Find the calls that may hold a size which slimming changes: `x.chunk(2, 1)`, `reshape(b, groups, -1, h, w)`.

torch's own layers read most sizes from fields, which slimming updates. Only other calls can hold one.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, fx, nn

from rewriters.labelling import Labelled, Labelling, varying
from rewriters.labelling.rules import creation, find_rule, kernels, mixing, movement
from rewriters.recording import ModuleCall, args_of, leaves_of

_RULES_WITH_SIZES = (
    creation.create, mixing.group_norm, mixing.layer_norm, movement.channel_shuffle, movement.expand, movement.move,
    movement.pad, movement.reshape, movement.roll,
)  # fmt: skip


_TORCH_MODULES_WITH_SIZES = (
    nn.Unflatten, nn.ChannelShuffle, nn.MultiheadAttention, nn.modules.padding._ConstantPadNd,
)  # fmt: skip


def knows_its_sizes(module: nn.Module) -> bool:
    """Whether a module takes every size from its fields, which slimming updates."""
    if isinstance(module, nn.GroupNorm) or hasattr(module, "normalized_shape"):
        return _follows_weight(module)
    own_size = isinstance(module, _TORCH_MODULES_WITH_SIZES)
    return type(module).__module__.startswith("torch.nn.modules") and not own_size


def _follows_weight(module: nn.Module) -> bool:
    """Whether the fields of a norm across channels equal its weight's shape, so that they can follow it."""
    weight = getattr(module, "weight", None)
    shape = (module.num_channels,) if isinstance(module, nn.GroupNorm) else getattr(module, "normalized_shape", None)
    return isinstance(weight, Tensor) and isinstance(shape, (tuple, list)) and tuple(shape) == tuple(weight.shape)


def sizes_to_read(labelling: Labelling, call: ModuleCall, known: Mapping[int, Labelled]) -> set[int]:
    """Lengths of a module's inputs along dimensions that slimming shortens: its forward may read them."""
    given = [known[id(leaf)] for leaf in leaves_of((call.args, call.kwargs)) if id(leaf) in known]
    removable = [layer for value in given for layer in value.layers if not labelling.pinned(layer).all()]
    return {layer.shape[dim] for layer in removable for dim in varying(layer)}


def takes_sizes(node: fx.Node, module: nn.Module) -> bool:
    """Whether a call takes numbers that slimming may change (fields that are updated don't count)."""
    found = find_rule(node.target)
    if found is kernels.convolution:
        return args_of(node)[8] > 1 and not isinstance(module, nn.modules.conv._ConvNd)
    return found in _RULES_WITH_SIZES


def may_hold_size(labelling: Labelling, node: fx.Node, readable: set[int]) -> bool:
    """Whether a call that takes sizes may hold one that slimming changes.

    Args:
        labelling: of the captured model.
        node: the call.
        readable: sizes that change and that the forward may have read elsewhere, though nothing changes at this call.
    """
    found = find_rule(node.target)
    if found in (creation.create, movement.expand, movement.reshape) and readable & set(node.meta["val"].shape):
        return True
    if found is movement.pad:
        padded = {node.meta["val"].ndim - 1 - place // 2 for place, width in enumerate(args_of(node)[1]) if width}
        layers = labelling.values[args_of(node)[0]].layers
        if not any(padded & set(varying(layer)) for layer in layers):
            return False
    return any(not labelling.pinned(layer).all() for value in _labels_at(labelling, node) for layer in value.layers)


def _labels_at(labelling: Labelling, node: fx.Node) -> list[Labelled]:
    values = [labelling.values[source] for source in node.all_input_nodes] + [labelling.values[node]]
    return [value for value in leaves_of(values) if isinstance(value, Labelled)]
