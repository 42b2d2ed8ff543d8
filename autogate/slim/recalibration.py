"""Recompute batch norms' running statistics, with the weights fixed."""

from __future__ import annotations

import copy
import itertools
import warnings
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from autogate.inputs import run_on
from rewriters import AutogateError

with warnings.catch_warnings():
    warnings.simplefilter("ignore", FutureWarning)  # fvcore scripts a function on import
    from fvcore.nn.precise_bn import update_bn_stats

M = TypeVar("M", bound=nn.Module)


def recalibrate(model: M, loader: Iterable[Any], *, batches: int = 200) -> M:
    """Recompute the running statistics of a model's batch norms, as averages over many batches.

    While gates close, the running averages lag behind the weights, and an evaluation in the middle of a run sees a
    worse model than there is. This is fvcore's precise BN (Wu and Johnson, "Rethinking 'Batch' in BatchNorm", section
    3): the weights are fixed, and the batches' statistics are averaged. Everything but the batch norms runs in eval
    mode meanwhile. Norms that don't run in eval mode (those of auxiliary heads) keep their statistics.

        >>> import timm, torch, autogate
        >>> model = autogate.prepare(timm.create_model("resnet18", num_classes=10))
        >>> loader = [(torch.randn(4, 3, 64, 64), torch.zeros(4)) for _ in range(3)]
        >>> model = autogate.recalibrate(model, loader)

    Args:
        model: prepared, finalized or neither; the same object is returned. The forwards run on a copy of it.
        loader: yields batches: tensors, mappings of keyword arguments, or tuples or lists whose first item is one of
            these (images and labels). They are moved to the model's device.
        batches: number of batches to average over; all of the loader's, if its length is smaller.

    Raises:
        AutogateError: the loader yields too few batches, or a norm runs several times in one forward, which fvcore
            can't average. The statistics are left as they were.
    """
    trial = copy.deepcopy(model).eval()
    norms = _norms(trial)
    if not norms:
        return model
    ran: set[nn.Module] = set()
    for norm in norms:
        norm.training = True
        norm.register_forward_hook(lambda norm, *_: ran.add(norm))
    count = max(1, min(batches, _length(loader, batches)))
    try:
        update_bn_stats(_Caller(trial), itertools.islice(_repeated(loader), count), count)
    except AssertionError as error:
        raise AutogateError(
            f"its batch norms can't be recalibrated: {error}",
            where=type(model).__name__,
            remedy="Pass a loader with at least one batch, and `batches` no larger than its number of batches.",
        ) from error
    for norm, taken in zip(_norms(model), norms, strict=True):
        for name in ("running_mean", "running_var") if taken in ran else ():
            norm.get_buffer(name).copy_(taken.get_buffer(name))  # in place: compiled graphs hold the buffers
    return model


class _Caller(nn.Module):
    """Calls a model on batches as loaders yield them."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, batch: Any) -> Any:
        return run_on(self.model, batch)


def _norms(model: nn.Module) -> list[nn.Module]:
    """The batch norms that keep running statistics."""
    return [module for module in model.modules() if isinstance(module, _BatchNorm) and module.running_mean is not None]


def _length(loader: Iterable[Any], otherwise: int) -> int:
    try:
        return len(loader)  # type: ignore[arg-type]
    except TypeError:  # a generator, or a loader over an iterable data set
        return otherwise


def _repeated(loader: Iterable[Any]) -> Iterator[Any]:
    """The loader's batches, over and over. Ends if the loader yields none."""
    while True:
        given = 0
        for batch in loader:
            given += 1
            yield batch
        if not given:
            return
