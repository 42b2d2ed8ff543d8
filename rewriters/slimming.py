"""Take dead channels out of a live model: slice its tensors, follow up its fields, rewrite its forwards."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from rewriters.analysis import Analysis
from rewriters.channel_map import ALWAYS, ChannelMap, Kernel, Side
from rewriters.errors import SurgeryError
from rewriters.forward import RewrittenForward
from rewriters.journal import Journal


@dataclass(frozen=True)
class SlimPlan:
    """What is left of a model.

    Attributes:
        live: classes that stay, bool of shape (classes,).
        kept: for each side that loses something, the indices that stay (int64).
        forwards: rewritten forwards by module path: a graph for eval mode (False) and train mode (True).
    """

    live: Tensor
    kept: Mapping[Side, Tensor]
    forwards: Mapping[str, Mapping[bool, fx.Graph]]


def with_survivors(channel_map: ChannelMap, live: Tensor) -> Tensor:
    """Live classes and, on each side that would be left with nothing, its first class.

    A layer that still runs needs a channel; the one kept has a zero kernel behind it, so that outputs
    don't change.
    """
    live = live.clone()
    for classes in channel_map.classes.values():
        if not (classes == ALWAYS).any() and not live[classes].any():
            live[classes[0]] = True
    return live


def plan(analysis: Analysis, live: Tensor) -> SlimPlan:
    """Plan the slimming to the classes in `live` (bool, shape (classes,)).

    Raises:
        SurgeryError: a forward cannot be rewritten for this pattern.
    """
    channel_map = analysis.channel_map
    live = with_survivors(channel_map, live.cpu())
    kept = {}
    for side, classes in channel_map.classes.items():
        indices = channel_map.kept(side, live)
        if len(indices) < len(classes):
            kept[side] = indices
    return SlimPlan(live, kept, _rewrite(analysis, live))


def _rewrite(analysis: Analysis, live: Tensor) -> dict[str, dict[bool, fx.Graph]]:
    """Rewritten forwards of the modules whose own code doesn't do for this pattern."""
    cut = analysis.cut(live)
    graphs: dict[str, dict[bool, fx.Graph]] = {}
    changed: set[str] = set()
    for traced in analysis.traced:
        resizer = traced.resize(cut)
        changed |= {traced.path} if resizer.changed else set()
        modes = graphs.setdefault(traced.path, {})
        first = modes.setdefault(traced.training, resizer.graph)
        if _code(first) != _code(resizer.graph):
            raise SurgeryError("is called in several ways that would need different code", where=traced.path)
    return {path: modes for path, modes in graphs.items() if path in changed}


def _code(graph: fx.Graph) -> str:
    return graph.python_code("self").src


def tensor_slots(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, Tensor]]:
    """Every place a parameter or buffer stands in: (qualified name, module, name in it, tensor)."""
    for path, module in model.named_modules():
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                yield f"{path}.{name}".lstrip("."), module, name, tensor


def apply(model: nn.Module, slim_plan: SlimPlan, kernels: tuple[Kernel, ...], journal: Journal,
          replace: Callable[[Tensor, Tensor], Tensor] | None = None) -> None:  # fmt: skip
    """Carry out a plan on the live model, every change noted in `journal`.

    Args:
        replace: makes the tensor to put in the place of an old one, from (old, sliced); by default a
            parameter or buffer like the old one.
    """
    replace = replace or _like
    cuts: dict[str, list[tuple[int, Tensor]]] = {}
    for side, indices in slim_plan.kept.items():
        cuts.setdefault(side.tensor, []).append((side.dim, indices))
    sliced: dict[int, Tensor] = {}  # a tensor that stands in several places stays one
    first_name = {name: tensor for name, _, _, tensor in reversed(list(tensor_slots(model)))}
    for name, dims in cuts.items():
        tensor = first_name[name]
        sliced[id(tensor)] = replace(tensor, _slice(tensor, dims))
    grouped = {kernel.weight for kernel in kernels if not kernel.mixes}
    for name, module, own_name, tensor in list(tensor_slots(model)):
        if id(tensor) in sliced:
            journal.set_tensor(module, own_name, sliced[id(tensor)])
            for field, value in _fields(module, own_name, tensor.shape, sliced[id(tensor)].shape, name in grouped):
                journal.set_attribute(module, field, value)
    for path, graphs in slim_plan.forwards.items():
        module = model.get_submodule(path)
        journal.set_attribute(module, "forward", RewrittenForward(module, graphs))


def _slice(tensor: Tensor, dims: list[tuple[int, Tensor]]) -> Tensor:
    sliced = tensor.detach()
    for dim, indices in dims:
        sliced = sliced.index_select(dim, indices.to(tensor.device))
    channels_last = tensor.ndim == 4 and not tensor.is_contiguous()
    return sliced.contiguous(memory_format=torch.channels_last) if channels_last else sliced


def _like(old: Tensor, sliced: Tensor) -> Tensor:
    return nn.Parameter(sliced, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else sliced


def _fields(module: nn.Module, name: str, old: torch.Size, new: torch.Size, whole_groups: bool):
    """(field, value) pairs of a module that follow from the new shape of one of its tensors."""
    if isinstance(module, nn.modules.conv._ConvNd) and name == "weight":
        first, second = ("in_channels", "out_channels") if module.transposed else ("out_channels", "in_channels")
        groups = module.groups
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
    elif isinstance(module, nn.PReLU):
        yield "num_parameters", new[0]
