"""Several widths in one network, switched at run time.

A subnet is a set of channels. One network holds any number of them, nested or not, in the tensors of the dense model:
its largest subnet. Each is what `finalize` would give for its channels, output for output. Batch norms are each
subnet's own; all other weights are shared (Yang et al., "Non-uniform DNN Structured Subnets Sampling for Dynamic
Inference", section III; Yu et al., "Slimmable Neural Networks").

    found = autogate.subnets.find(model, x, flops=(0.1, 0.3), steps=1000, train=fit)   # which channels
    model = autogate.subnets.fuse(model, found)                                        # one network
    for images, labels in loader:
        optimizer.zero_grad()
        for active in autogate.subnets.each(model):                                    # trained together
            criterion(model(images), labels).backward()
        optimizer.step()
    autogate.subnets.switch(model, flops=0.3)                                          # at run time
"""

from __future__ import annotations

import contextlib
import copy
import random
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeVar

from torch import Tensor, nn

from autogate.api import gates, prepare
from autogate.closing import close
from autogate.criteria import Allocation, By
from autogate.inputs import as_calls
from autogate.lock import locked
from autogate.saliency import check_not_adaptive
from autogate.slim import PrepareRecord
from autogate.switching import (
    SUBNETS,
    Sharing,
    Status,
    Structure,
    Subnets,
    Which,
    latencies,
    number_of,
    status_of,
    subnets_of,
    table_of,
)
from autogate.switching import extract as extract_subnet
from autogate.switching import fuse as fuse_structures
from autogate.wrappers import unwrap
from rewriters import AutogateError, UndoLog

M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class Found:
    """The structures of several subnets of one model, and how the model was prepared to find them.

    Attributes:
        structures: which channels each subnet has.
        origin: the arguments that the channels were found with.
    """

    structures: tuple[Structure, ...]
    origin: PrepareRecord = field(repr=False)

    def __str__(self) -> str:
        return table_of(self.structures)


def of(*prepared: nn.Module, names: Sequence[str] | None = None) -> Found:
    """The structures of models that were prepared alike: each one's live channels are a subnet.

    Args:
        prepared: models with gates, trained or closed by hand; left as they are.
        names: a name for each; the share of the FLOPs that is left if None.

    Raises:
        AutogateError: a model has no gates; two were prepared with other arguments, or differ in their channels; or
            the names don't fit.
    """
    if not prepared or (names is not None and len(names) != len(prepared)):
        raise AutogateError(f"{len(prepared)} models and {len(names or ())} names.", where="subnets.of")
    banks = [gates(model) for model in prepared]
    origins: list[PrepareRecord] = [bank.origin for bank in banks]
    first = origins[0].options
    for bank, options in zip(banks, (origin.options for origin in origins), strict=True):
        bank.fold()
        differs = banks[0].channel_map.difference(bank.channel_map)
        alike = (options.ignored, options.shortcuts, options.embed) == (first.ignored, first.shortcuts, first.embed)
        if differs is not None or not alike:
            raise AutogateError(
                "the models were prepared with other arguments, or their channels differ.",
                where=differs or "prepare",
                remedy="Prepare copies of one model with the same `ignore`, `shortcuts` and `embed`.",
            )
    shares = [bank.shares() for bank in banks]
    called = names if names is not None else [f"{next(iter(one.values())):.3f}" for one in shares]
    structures = tuple(
        Structure.of(name, bank.channel_map, bank.live.cpu(), share, bank.dead.cpu())
        for name, bank, share in zip(called, banks, shares, strict=True)
    )
    return Found(structures, origins[0])


def find(
    model: nn.Module, example_inputs: Any = None, *, flops: Sequence[float],
    train: Callable[[nn.Module], object] | None = None, by: By | None = None, batches: Iterable[Any] | None = None,
    loss: Callable[..., Tensor] | None = None, allocation: Allocation = "global", **arguments: Any,
) -> Found:  # fmt: skip
    """Find a structure for each budget, with or without training.

    With `train`, a copy of the model is prepared and trained for each. With `by`, one copy closes its gates to one
    budget after the other, so that each subnet is a part of the next.

    Args:
        model: the dense model; left as it is.
        example_inputs: as for `prepare`.
        flops: the share of the FLOPs of each subnet, in (0, 1).
        train: trains a prepared model until its gates have met the budget, or closes them itself.
        by: instead, the criterion to close gates by, as for `close`.
        batches: for the criterion, as for `close`; a list or a loader, because they are run through for each budget.
        loss: for the criterion, as for `close`.
        allocation: for the criterion, as for `close`.
        arguments: more arguments of `prepare`: `steps`, `shortcuts`, `round_to` ...

    Raises:
        AutogateError: as `prepare` and `close`; or not one of `train` and `by` is given.
    """
    if not flops:
        raise AutogateError("no share is given.", where="subnets.find", remedy="Pass flops=(0.1, 0.3).")
    if (train is None) == (by is None):
        raise AutogateError(
            "channels are found by training or by a criterion.", where="subnets.find",
            remedy='Pass train=fit, or by="l1".',
        )  # fmt: skip
    if by is None and (batches is not None or loss is not None or allocation != "global"):
        raise AutogateError(
            "batches, loss and allocation are for a criterion.", where="subnets.find", remedy="Pass them with by=."
        )
    found: dict[float, Found] = {}
    if train is not None:
        for share in flops:
            trial = prepare(copy.deepcopy(model), example_inputs, flops=share, **arguments)
            train(trial)
            found[share] = of(trial, names=[f"{share:g}"])
    elif by is not None:
        trial = prepare(copy.deepcopy(model), example_inputs, flops=min(flops), **arguments)
        for share in sorted(flops, reverse=True):
            close(trial, by, batches=batches, loss=loss, allocation=allocation, flops=share)
            found[share] = of(trial, names=[f"{share:g}"])
    return Found(tuple(found[share].structures[0] for share in flops), found[flops[0]].origin)


@locked
def fuse(
    model: M, found: Found, *, norms: Literal["own", "statistics"] = "own", nested: bool = False,
    example_inputs: Any = None,
) -> M:  # fmt: skip
    """Make a model that holds all subnets; its largest is the model itself, called "full".

    The same object is returned, with its class, its paths and its parameters. Between two forwards its state_dict is
    the dense one, and the tensors that subnets have for themselves under `autogate_subnets`. They start with the dense
    model's values, which `autogate.recalibrate` brings in line with the active subnet. Build the optimizer after this.

    Args:
        model: the dense model, without gates.
        found: the structures.
        norms: "own": statistics, weights and biases of batch norms are each subnet's own; "statistics": weights and
            biases are shared. Norms across channels (layer norm ...) run over the subnet's channels and are shared.
        nested: each subnet is a part of the next. Channels are put in an order in which it has the first ones, so that
            its slices are views of the weights and take no memory; the model computes what it did. Groups whose
            position matters to the forward keep their order, and slices of these are copies.
        example_inputs: as for `prepare`; those that the structures were found with if None.

    Raises:
        AutogateError: the model has gates or subnets, the structures belong to another one, aren't nested as they
            should be, or two have the same name. The model is left as it was.
    """
    where = type(model).__name__
    check_not_adaptive(model)
    if SUBNETS in model._modules:
        raise AutogateError("it has subnets already.", where=where, remedy="Fuse all of them at once.")
    if norms not in ("own", "statistics"):
        raise AutogateError(f"norms is {norms!r}.", where=where, remedy="Pass 'own' or 'statistics'.")
    if unwrap(model) is not model:
        raise AutogateError("it is wrapped.", where=where, remedy="Fuse the model, then compile or wrap it.")
    calls = found.origin.calls_for(model) if example_inputs is None else as_calls(example_inputs, model)
    options = found.origin.options.on(calls)
    undo_log = UndoLog()
    try:
        origin, sharing = replace(found.origin, options=options), Sharing(norms == "own", nested)
        fuse_structures(model, found.structures, origin, sharing, undo_log)
    except BaseException:
        undo_log.undo()
        raise
    return model


def switch(
    model: nn.Module, which: Which | None = None, *, flops: float | None = None, params: float | None = None,
    latency: float | None = None, between: bool = False,
) -> Structure:  # fmt: skip
    """Make one subnet the active one, until the next switch. No tensor is copied that is there already.

    With `between`, a width that was never trained will do: on the way from a subnet to the next wider one, the same
    part of the channels that it lacks is there in every group, and those that died last come first (Yang et al.,
    section V.A). Its batch norms start with those of its neighbours, so call `autogate.recalibrate` before it is used.
    It stays with the model, so that the next switch to it takes no longer than to another subnet.

    Args:
        model: has subnets.
        which: number, name, or share of the FLOPs (a float) of the subnet.
        flops: take the largest subnet with at most this share of the FLOPs, in (0, 1].
        params: the same for the parameters; if several are given, all hold.
        latency: the same for the time of a forward over one sample, of the dense model's. It is measured once a subnet,
            at the first call.
        between: whether to make a width that comes nearer to the share, where no subnet is within half a point of it.
            It has at most the share.

    Returns:
        What is active now.

    Raises:
        AutogateError: no subnet is called so or fits; or a forward is running.
    """
    model, subnets = _with_subnets(model)
    limits = {"FLOPs": flops, "parameters": params, "latency": latency}
    subnets.switch(model, _number(model, subnets, which, limits, between))
    return subnets.subnet.structure


@contextlib.contextmanager
def active(
    model: nn.Module, which: Which | None = None, *, flops: float | None = None, params: float | None = None,
    latency: float | None = None, between: bool = False,
) -> Iterator[Structure]:  # fmt: skip
    """Inside, another subnet is active. Arguments are those of `switch`."""
    model, subnets = _with_subnets(model)
    limits = {"FLOPs": flops, "parameters": params, "latency": latency}
    with subnets.switched(model, _number(model, subnets, which, limits, between)):
        yield subnets.subnet.structure


@dataclass(frozen=True)
class Active:
    """A subnet's turn in a training step.

    Attributes:
        number: the subnet's number; 0 is the smallest.
        structure: its channels and shares.
        teacher: what the largest subnet answered in this step, detached, for in-place distillation (Yu and Huang,
            "Universally Slimmable Networks and Improved Training Techniques", section 3.3); None for the largest.
    """

    number: int
    structure: Structure
    teacher: Any = field(repr=False)


def each(
    model: nn.Module, rule: Literal["all", "sandwich"] = "all", *, between: int = 2, seed: int | None = None
) -> Iterator[Active]:
    """Switch to one subnet after the other, the largest first, for one training step (algorithm 1 of the paper).

    Gradients of shared weights add up: call backward for each, and step the optimizer after the loop. Then the subnet
    that was active before is active again.

    Args:
        model: has subnets.
        rule: "all" of them, or "sandwich": the largest, the smallest, and some between drawn at random (Yu and Huang,
            section 3.2).
        between: how many of those in between the sandwich has.
        seed: of that draw; Python's generator if None. Processes that train together need the same.

    Raises:
        AutogateError: the model has no subnets, or the rule is unknown.
    """
    model, subnets = _with_subnets(model)
    if rule not in ("all", "sandwich"):
        raise AutogateError(f"rule is {rule!r}.", where="subnets.each", remedy="Pass 'all' or 'sandwich'.")
    largest = subnets.full
    numbers = list(range(largest))
    if rule == "sandwich":
        draw = random.Random(seed) if seed is not None else random
        numbers = sorted({0, *draw.sample(numbers[1:], min(between, largest - 1))})
    return _turns(model, subnets, [largest, *reversed(numbers)])


def _turns(model: nn.Module, subnets: Subnets, numbers: Sequence[int]) -> Iterator[Active]:
    before, subnets.teaches = subnets.active, True
    try:
        for number in numbers:
            subnets.switch(model, number)
            teacher = subnets.teacher if number != numbers[0] else None
            yield Active(number, subnets.subnet.structure, teacher)
    finally:
        subnets.teacher, subnets.teaches = None, False
        subnets.switch(model, before)


@locked
def extract(
    model: nn.Module, which: Which | None = None, *, flops: float | None = None, params: float | None = None,
    latency: float | None = None,
) -> nn.Module:  # fmt: skip
    """A subnet as a slim model of its own: to export, to save, to train on. Arguments are those of `switch`.

    Returns:
        A model like `finalize`'s, that shares no tensor with `model`.

    Raises:
        AutogateError: no subnet is called so or fits.
        VerificationError: its outputs would not be those of the subnet.
    """
    model, subnets = _with_subnets(model)
    limits = {"FLOPs": flops, "parameters": params, "latency": latency}
    number = number_of(model, subnets, which, limits)
    if not subnets.subnets[number].calibrated:
        warnings.warn(
            f"the norms of the width {subnets.subnets[number].structure.name!r} were never recalibrated: they have "
            "the statistics of other widths. Call autogate.recalibrate(model, loader) while it is active.",
            stacklevel=2,
        )
    return extract_subnet(model, subnets, number)


def status(model: nn.Module, *, latency: bool = False) -> Status:
    """What subnets a model has, which one is active, and what is kept of them in memory.

    Args:
        model: has subnets.
        latency: whether to time those that were not timed on this machine yet.

    Raises:
        AutogateError: the model has no subnets.
    """
    model, subnets = _with_subnets(model)
    if latency:
        locked(latencies)(model, subnets)
    return status_of(model, subnets)


def _number(
    model: nn.Module, subnets: Subnets, which: Which | None, limits: Mapping[str, float | None], between: bool
) -> int:
    """`number_of`; where that makes or measures something, no other thread does."""
    meant = locked(number_of) if between or limits["latency"] is not None else number_of
    return meant(model, subnets, which, limits, between)


def _with_subnets(model: nn.Module) -> tuple[nn.Module, Subnets]:
    model = unwrap(model)
    found = subnets_of(model)
    if found is None:
        raise AutogateError(
            "it has no subnets.", where=type(model).__name__, remedy="Call autogate.subnets.fuse(model, found) first."
        )
    return model, found
