"""Tensors that each subnet has for itself: its batch norms, and the buffers that lose channels.

Statistics of a batch norm depend on all channels before it, so they differ from subnet to subnet (Yang et al.,
"Non-uniform DNN Structured Subnets Sampling for Dynamic Inference", section III.B; Yu et al., "Slimmable Neural
Networks"). They stand in a tree of plain modules with the paths of the model's own, so that `state_dict` reads
`autogate_subnets.0.layer1.0.bn1.running_mean`, and optimizers, averages, casts and device moves reach them.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from rewriters.recording import tensor_slots
from rewriters.slimming import Overlay, Place, is_under


@dataclass(frozen=True, eq=False)
class OwnTensor:
    """A tensor of one subnet.

    Attributes:
        name: the qualified name of the dense tensor that it stands for, or of a constant that the dense model lacks.
        at: where the subnet's tensor is.
        places: where the model's modules look for it.
    """

    name: str
    at: Place
    places: tuple[Place, ...]

    def put(self) -> None:
        """Put the subnet's tensor before the dense one."""
        tensor = self.at.own()
        for place in self.places:
            place.put(tensor)


def own_tensors(
    model: nn.Module, overlay: Overlay, removed: frozenset[str], affine: bool
) -> tuple[nn.Module, list[OwnTensor]]:
    """Make a subnet's own tensors, with the values that the dense model has there.

    Args:
        model: the dense model.
        overlay: the subnet's.
        removed: paths of the modules that the subnet doesn't call.
        affine: whether batch norms' weights and biases are the subnet's own, beside their statistics.

    Returns:
        The tree that holds them, and the tensors.
    """
    tree, made = nn.Module(), []
    slices = {place: one for one in overlay.slices for place in one.places}
    done: set[int] = set()
    for name, module, own_name, tensor in tensor_slots(model):
        place = Place(module, own_name)
        one = slices.get(place)
        if is_under(name, removed) or id(tensor) in done or not _is_own(module, own_name, one is not None, affine):
            continue
        done.add(id(tensor))
        value = (one.take() if one is not None else tensor).detach().clone()
        value = nn.Parameter(value, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else value
        persistent = own_name not in module._non_persistent_buffers_set
        at = _hold(tree, name, value, persistent)
        made.append(OwnTensor(name, at, one.places if one is not None else (place,)))
    for name, place, value in overlay.constants:
        made.append(OwnTensor(name, _hold(tree, name, value.clone(), True), (place,)))
    return tree, made


def _is_own(module: nn.Module, name: str, is_cut: bool, affine: bool) -> bool:
    if name in module._buffers:
        return is_cut or (isinstance(module, _NormBase) and module.running_mean is not None)
    return affine and isinstance(module, _NormBase) and module.running_mean is not None


def _hold(tree: nn.Module, name: str, value: Tensor, persistent: bool) -> Place:
    """Put a tensor into the tree under a qualified name."""
    *path, own_name = name.split(".")
    holder = tree
    for part in path:
        if part not in holder._modules:
            holder.add_module(part, nn.Module())
        holder = holder.get_submodule(part)
    if isinstance(value, nn.Parameter):
        holder.register_parameter(own_name, value)
    else:
        holder.register_buffer(own_name, value, persistent)
    return Place(holder, own_name)
