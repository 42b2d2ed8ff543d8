"""`close`: gates of a prepared model go to the budget at once, by a criterion instead of by training."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar, get_args

import torch
from torch import Tensor, nn

from autogate.api import gates
from autogate.budget import ResourceMaker, Shares
from autogate.compensation import compensated
from autogate.criteria import CRITERIA, Allocation, Batches, By, choose, scores_of
from autogate.gating import GateBank, has_shards
from autogate.lock import locked
from autogate.methods import Learner
from autogate.slim import PrepareRecord
from autogate.wrappers import unwrap
from rewriters import AutogateError

M = TypeVar("M", bound=nn.Module)


@locked
def close(
    model: M,
    by: By = "l1",
    *,
    batches: Iterable[Any] | None = None,
    loss: Callable[..., Tensor] | None = None,
    allocation: Allocation = "global",
    over_price: bool | None = None,
    compensate: bool = False,
    flops: float | None = None,
    params: float | None = None,
    activations: float | None = None,
    latency: float | None = None,
    resources: Mapping[ResourceMaker, float] | None = None,
) -> M:
    """Close gates of a prepared model at once, until its budget is met: those whose classes score lowest.

    A class's score counts all coupled kernels together. As in training, layers keep their least width and end with
    multiples of `round_to`. Fine-tune the slim model afterwards: a network that was not trained to lose these channels
    loses accuracy with them.

        >>> import timm, autogate
        >>> model = autogate.prepare(timm.create_model("resnet18", num_classes=10), flops=0.6)
        >>> model = autogate.close(model, by="l1")
        >>> round(autogate.gates(model).shares()["FLOPs"], 2)
        0.6
        >>> slim = autogate.finalize(model)

    It can be called several times with falling budgets, with training in between, and before or in the middle of
    training with gates. The model keeps its mode, gradients and buffers: criteria that run it run a copy.

    With `compensate`, what a kernel read of channels that close is predicted, by ridge regression over the batches,
    from the channels that it goes on reading, and the prediction is multiplied into its weights: layer after layer, in
    the order in which they run. The penalty is on the change of the weights, and is chosen for each layer on a quarter
    of the rows that is held out, so a layer of which the batches say too little stays as it is. A constant goes to the
    layer's bias, or off the running mean of a batch norm behind it; where there is neither, the prediction has none.
    Kernels that something else reads too (tied embeddings) or that are computed in the forward stay as they are. The
    first 256 samples are used, joined into one batch.

    In a distributed run, call it on every process; scores and compensated weights are averaged over them.

    Args:
        model: the model that `prepare` returned, or a compiled or distributed wrapper around it; the same object is
            returned.
        by: "l1", "l2", "lamp", "bn_scale" or "fpgm", which read weights alone; "activation", which needs `batches`;
            "taylor" or "fisher", which need `batches` and `loss`; "random"; or a function that gets the gate bank and
            returns one score a class, shape (classes,). Classes with an infinite score stay.
        batches: what loaders yield: tensors, mappings of keyword arguments, or tuples or lists whose first item is one
            of these (images and labels). All of them are used.
        loss: called as `loss(outputs, labels)`; the attribute `loss` of the model's outputs if None.
        allocation: "global" compares all classes of the model, so that layers end with widths of their own. "uniform"
            compares those of one group, so that all layers keep the same part.
        over_price: whether "global" compares scores divided by what a class costs of the budget's resources. None:
            only those of "taylor" and "fisher", which estimate what closing costs the loss. The scores of the others
            are relative to the layer, and dividing them would close one layer after the other.
        compensate: let the channels that stay make up for those that close (see below). It needs `batches`, without
            labels.
        flops: share of the FLOPs to keep, instead of the budget given to `prepare`; see there.
        params: share of the parameters to keep, likewise.
        activations: share of the activation bytes to keep, likewise.
        latency: share of the time to keep, likewise.
        resources: shares of resources of your own, likewise.

    Raises:
        AutogateError: the model has no gates, or is sharded; the criterion is unknown, lacks batches or a loss, or its
            scores are not one number a class; the budget is out of reach; or, with `compensate`, batches can't be
            joined, or what a kernel reads is not finite. The model is left as it was.
    """
    network, bank = unwrap(model), gates(model)
    if allocation not in get_args(Allocation):
        raise AutogateError(
            f"allocation is {allocation!r}.", where="close", remedy=f"It is {' or '.join(get_args(Allocation))}."
        )
    if has_shards(network):
        raise AutogateError(
            "its parameters are sharded.", where=type(network).__name__, remedy="Close gates before fully_shard."
        )
    if compensate and iter(batches or ()) is batches:
        batches = list(batches)  # they are read twice
    bank.fold()
    learner = _learner(network, bank, Shares.given(flops, params, activations, latency, resources or {}))
    scores = scores_of(network, bank, by, None if batches is None else Batches(batches, loss))
    live = bank.live.cpu()
    if over_price is None:
        over_price = isinstance(by, str) and CRITERIA[by].needs == "loss"
    deaths = choose(learner.selection, learner.groups, scores, live, allocation, over_price)
    _check_reached(learner, live.index_fill(0, deaths.classes, False), deaths.settled)
    changes = compensated(network, bank, deaths.classes, batches or ()) if compensate else {}
    bank.close(deaths.classes, deaths.settled and learner is bank.learner)
    _write(network, changes)
    bank.fold(stepped=True)
    return model


@torch.no_grad()
def _write(model: nn.Module, changes: Mapping[str, Tensor]) -> None:
    """Write tensors into those of the model that have their names."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for name, value in changes.items():
        tensors[name].copy_(value)


def _learner(network: nn.Module, bank: GateBank, shares: Shares | None) -> Learner:
    """Knows targets, groups and least widths: the bank's own, or one for other shares."""
    if shares is None:
        return bank.learner
    origin: PrepareRecord = bank.origin
    known = [target.resource for target in bank.targets.targets]
    targets = shares.targets(network, bank.channel_map, origin.calls_for(network)[0], bank.added, known=known)
    return bank.learner.towards(targets, bank.channel_map)


def _check_reached(learner: Learner, live: Tensor, settled: bool) -> None:
    targets = learner.targets
    if settled or learner.selection.distance(live) <= 0:
        return
    wanted = targets.wanted()
    missed = [
        f"{share:.3f} of the {name} are left for {wanted[name]:.3f}" for name, share in targets.shares(live).items()
    ]
    raise AutogateError(
        f"the budget is out of reach: {' and '.join(missed)} once all classes with a finite score are closed.",
        where="close",
        remedy="Ask for a larger share, or give finite scores to more classes.",
    )
