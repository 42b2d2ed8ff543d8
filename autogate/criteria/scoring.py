"""Scores of a model's classes by a criterion, checked."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from autogate.criteria.batches import Batches
from autogate.criteria.readings import Readings
from autogate.criteria.registry import By, find_criterion
from autogate.gating import GateBank
from rewriters import AutogateError


@torch.no_grad()
def scores_of(model: nn.Module, bank: GateBank, by: By, batches: Batches | None = None) -> Tensor:
    """Score the classes of a prepared model.

    In a distributed run with an initialised process group every process must call this. Scores are averaged over the
    processes, each of which may have other batches.

    Args:
        model: a prepared model, its gates folded; it is left as it is.
        bank: its gate bank.
        by: the criterion.
        batches: for criteria that read gradients or activations.

    Returns:
        One score a class, float64, shape (classes,), on the CPU. Those of dead classes mean nothing.

    Raises:
        AutogateError: there is no such criterion, it needs batches or a loss and has none, or its scores are not one
            number a class.
    """
    if isinstance(by, str):
        found = find_criterion(by)
        if found.needs != "weights" and batches is None:
            also = " and a loss" if found.needs == "loss" else ""
            raise AutogateError(
                f"the criterion {by!r} needs batches{also}, and none were given.",
                where="close",
                remedy="Pass batches=, a loader or a list, or use a criterion of weights alone, 'l1' for instance.",
            )
        scores = found.score(Readings(model, bank, batches))
    elif callable(by):
        scores = by(bank)
    else:
        raise AutogateError(
            f"`by` is of type {type(by).__name__}.", where="close", remedy="Pass the name of a criterion or a function."
        )
    name = by if isinstance(by, str) else getattr(by, "__name__", type(by).__name__)
    return _over_processes(_checked(scores, bank, name))


def _checked(scores: Tensor, bank: GateBank, name: str) -> Tensor:
    size = bank.channel_map.size
    shape = tuple(scores.shape) if isinstance(scores, Tensor) else None
    if shape != (size,) or scores.is_complex():
        what = f"a tensor of shape {shape}" if shape is not None else type(scores).__name__
        raise AutogateError(
            f"the criterion {name!r} returned {what}; it must return one real number a class, shape ({size},).",
            where="close",
        )
    scores = scores.detach().to("cpu", torch.float64)
    broken = torch.nonzero((torch.isnan(scores) | (scores == -torch.inf)) & bank.live.cpu()).flatten().tolist()
    if broken:
        raise AutogateError(
            f"the criterion {name!r} gives {len(broken)} of {size} classes no score (NaN).",
            where=bank.describe(broken[:1]),
            remedy="Check that weights and batches are finite.",
        )
    return scores


def _over_processes(scores: Tensor) -> Tensor:
    """The mean over the processes of a distributed run, the same on all of them."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return scores
    gathered: list[Tensor | None] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, scores)
    return torch.stack([one for one in gathered if one is not None]).mean(0)
