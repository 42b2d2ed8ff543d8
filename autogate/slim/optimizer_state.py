"""Let an optimizer continue with the slim model: its parameters are replaced, and its state is sliced like them.

Slim tensors are new parameters, because PyTorch's optimizers and autograd depend on a parameter's shape. An optimizer
that continues computes what it would have computed with gates. Dead channels had no part in that: their columns are
zero, and so are the gradients of everything that feeds them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from autogate.slim.history import KeptIndices, Slimming, kept_by_side
from autogate.slim.stale_optimizers import tell_of_steps_with
from rewriters import AutogateError, Side
from rewriters.slimming import take_indices


@dataclass(frozen=True, eq=False)
class Replacement:
    """What becomes of a parameter.

    Attributes:
        new: the parameter that replaces it; None if none does.
        kept: the indices that stay (int64), by dimension, for dimensions that lose any.
        dead: those that stay though they are dead: the optimizer must not move them.
    """

    new: nn.Parameter | None
    kept: Mapping[int, Tensor]
    dead: Mapping[int, Tensor]


def as_optimizers(given: Iterable[Any], model: nn.Module) -> tuple[Optimizer, ...]:
    """Check optimizers, and take them out of wrappers such as Lightning's; each is returned once.

    Raises:
        AutogateError: one is not an optimizer, or trains no parameter of the model.
    """
    found = tuple({id(one): one for one in map(_unwrapped, given)}.values())
    own = {id(parameter) for parameter in model.parameters()}
    for optimizer in found:
        if not isinstance(optimizer, Optimizer):
            raise AutogateError("it is not a torch.optim.Optimizer.", where=type(optimizer).__name__)
        if not any(id(parameter) in own for group in optimizer.param_groups for parameter in group["params"]):
            raise AutogateError(
                "it trains no parameter of the model.",
                where=type(optimizer).__name__,
                remedy="Pass the optimizer that trains the prepared model, or none and build a new one afterwards.",
            )
    return found


def _unwrapped(optimizer: Any) -> Any:
    """The optimizer inside a wrapper that is not an optimizer itself (Lightning's)."""
    if isinstance(optimizer, Optimizer):
        return optimizer
    within = getattr(optimizer, "optimizer", None)
    return within if isinstance(within, Optimizer) else optimizer


def parameters_of(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters by name; those in several places under each of their names."""
    return dict(model.named_parameters(remove_duplicate=False))


def take_along(
    optimizers: Iterable[Optimizer], before: Mapping[str, nn.Parameter], model: nn.Module, done: Slimming
) -> None:
    """Let optimizers continue with a slim model; others that still have its old parameters are told so.

    Args:
        optimizers: train the model.
        before: its parameters before the slimming (`parameters_of`).
        model: the slim model.
        done: how it was slimmed.
    """
    kept, dead = kept_by_side(done.kept), kept_by_side(done.dead)
    replacements = parameter_replacements(before, parameters_of(model), kept, dead)
    for one in optimizers:
        replace_parameters(one, replacements)
    tell_of_steps_with([parameter for parameter in before.values() if id(parameter) in replacements])


def parameter_replacements(
    before: Mapping[str, nn.Parameter], after: Mapping[str, nn.Parameter], kept: Mapping[Side, KeptIndices],
    dead: Mapping[Side, KeptIndices],
) -> dict[int, Replacement]:  # fmt: skip
    """What becomes of each parameter of a model that was slimmed, by its id. Parameters that stay are not listed.

    Args:
        before: the parameters by name; those in several places under each of their names.
        after: the same for the slim model.
        kept: the indices that stay along each side that lost any.
        dead: those that stay though they are dead.
    """
    names: dict[int, list[str]] = {}
    for name, parameter in before.items():
        names.setdefault(id(parameter), []).append(name)
    found = {}
    for key, own in names.items():
        new = next((after[name] for name in own if name in after), None)
        if id(new) != key:
            found[key] = Replacement(new, _by_dimension(kept, own), _by_dimension(dead, own))
    return found


def _by_dimension(indices: Mapping[Side, KeptIndices], names: Collection[str]) -> dict[int, Tensor]:
    found = {side.dim: one.kept for side, one in indices.items() if side.tensor in names}
    return {dim: torch.tensor(kept, dtype=torch.int64) for dim, kept in found.items()}


def replace_parameters(optimizer: Optimizer, replacements: Mapping[int, Replacement]) -> None:
    """Make an optimizer train the slim model. Its groups keep their settings, and parameters keep their state.

    A tensor in the state is sliced along each dimension in which it is as long as its parameter. Momentum and moments
    have the parameter's shape; factored ones have size 1 in some dimensions. If a parameter loses indices and its state
    has another kind of tensor, its state starts from scratch.
    """
    for group in optimizer.param_groups:
        stays = [(parameter, replacements.get(id(parameter))) for parameter in group["params"]]
        left = [one is None or one.new is not None for _, one in stays]
        if "param_names" in group:
            group["param_names"][:] = [name for name, stay in zip(group["param_names"], left, strict=True) if stay]
        group["params"][:] = [
            parameter if one is None else one.new for (parameter, one), stay in zip(stays, left, strict=True) if stay
        ]
    for parameter in [parameter for parameter in optimizer.state if id(parameter) in replacements]:
        one, state = replacements[id(parameter)], optimizer.state.pop(parameter)
        if one.new is not None and all(_can_be_cut(value, parameter) for value in state.values()):
            optimizer.state[one.new] = {name: _cut(value, parameter, one) for name, value in state.items()}
    for inner in vars(optimizer).values():  # Lookahead and similar optimizers hold one with the same groups
        if isinstance(inner, Optimizer):
            replace_parameters(inner, replacements)


def _can_be_cut(value: Any, parameter: Tensor) -> bool:
    if not isinstance(value, Tensor):
        return value is None or isinstance(value, bool | int | float | str)
    fits = zip(value.shape, parameter.shape, strict=False)
    return value.numel() == 1 or (value.ndim == parameter.ndim and all(own in (1, size) for own, size in fits))


def _cut(value: Any, parameter: Tensor, replacement: Replacement) -> Any:
    if not isinstance(value, Tensor) or value.numel() == 1:
        return value
    for dim, indices in replacement.dead.items():
        if value.shape[dim] == parameter.shape[dim]:
            value = value.index_fill(dim, indices.to(value.device), 0)
    dims = [(dim, indices) for dim, indices in replacement.kept.items() if value.shape[dim] == parameter.shape[dim]]
    return take_indices(value, dims)
