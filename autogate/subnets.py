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
import io
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeVar

from rich.console import Console
from rich.table import Table
from torch import nn

from autogate.api import gates, prepare
from autogate.inputs import as_calls
from autogate.lock import locked
from autogate.naming import did_you_mean
from autogate.saliency import check_not_adaptive
from autogate.slim import PrepareRecord
from autogate.switching import SUBNETS, Structure, Subnets, subnets_of
from autogate.switching import extract as extract_subnet
from autogate.switching import fuse as fuse_structures
from autogate.wrappers import unwrap
from rewriters import AutogateError, UndoLog

M = TypeVar("M", bound=nn.Module)

Which = int | str | float
"""A subnet: its number (0 is the smallest), its name, or the share of the FLOPs that it may have (a float)."""

TOLERANCE = 0.005
"""A subnet fits a share if it has at most this much more: budgets are met to within half a point."""


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
        return _table(self.structures)


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
        Structure.of(name, bank.channel_map, bank.live.cpu(), share)
        for name, bank, share in zip(called, banks, shares, strict=True)
    )
    return Found(structures, origins[0])


def find(
    model: nn.Module, example_inputs: Any = None, *, flops: Sequence[float], train: Callable[[nn.Module], object],
    **arguments: Any,
) -> Found:  # fmt: skip
    """Find a structure for each budget: a copy of the model is prepared and trained for each.

    Args:
        model: the dense model; left as it is.
        example_inputs: as for `prepare`.
        flops: the share of the FLOPs of each subnet, in (0, 1).
        train: trains a prepared model until its gates have met the budget, or closes them at once.
        arguments: more arguments of `prepare`: `steps`, `shortcuts`, `round_to` ...

    Raises:
        AutogateError: as `prepare`.
    """
    found: list[Found] = []
    for share in flops:
        trial = prepare(copy.deepcopy(model), example_inputs, flops=share, **arguments)
        train(trial)
        found.append(of(trial, names=[f"{share:g}"]))
    if not found:
        raise AutogateError("no share is given.", where="subnets.find", remedy="Pass flops=(0.1, 0.3).")
    return Found(tuple(one.structures[0] for one in found), found[0].origin)


@locked
def fuse(model: M, found: Found, *, norms: Literal["own", "statistics"] = "own", example_inputs: Any = None) -> M:
    """Make a model that holds all subnets; its largest is the model itself, called "full".

    The same object is returned, with its class, its paths and its parameters. Between two forwards its state_dict is
    the dense one, and the tensors that subnets have for themselves under `autogate_subnets`. They start with the dense
    model's values, which `autogate.recalibrate` brings in line with the active subnet. Build the optimizer after this.

    Args:
        model: the dense model, without gates.
        found: the structures.
        norms: "own": statistics, weights and biases of batch norms are each subnet's own; "statistics": weights and
            biases are shared. Norms across channels (layer norm ...) run over the subnet's channels and are shared.
        example_inputs: as for `prepare`; those that the structures were found with if None.

    Raises:
        AutogateError: the model has gates or subnets, the structures belong to another one, or two have the same name.
            The model is left as it was.
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
        fuse_structures(model, found.structures, replace(found.origin, options=options), norms == "own", undo_log)
    except BaseException:
        undo_log.undo()
        raise
    return model


def switch(
    model: nn.Module, which: Which | None = None, *, flops: float | None = None, params: float | None = None
) -> Structure:
    """Make one subnet the active one, until the next switch. No tensor is copied that is there already.

    Args:
        model: has subnets.
        which: number, name, or share of the FLOPs (a float) of the subnet.
        flops: take the largest subnet with at most this share of the FLOPs, in (0, 1].
        params: the same for the parameters; with `flops`, both hold.

    Returns:
        What is active now.

    Raises:
        AutogateError: no subnet is called so or fits; or a forward is running.
    """
    model, subnets = _with_subnets(model)
    subnets.switch(model, _index(subnets, which, flops, params))
    return subnets.subnet.structure


@contextlib.contextmanager
def active(
    model: nn.Module, which: Which | None = None, *, flops: float | None = None, params: float | None = None
) -> Iterator[Structure]:
    """Inside, another subnet is active. Arguments are those of `switch`."""
    model, subnets = _with_subnets(model)
    with subnets.switched(model, _index(subnets, which, flops, params)):
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
    model: nn.Module, which: Which | None = None, *, flops: float | None = None, params: float | None = None
) -> nn.Module:
    """A subnet as a slim model of its own: to export, to save, to train on. Arguments are those of `switch`.

    Returns:
        A model like `finalize`'s, that shares no tensor with `model`.

    Raises:
        AutogateError: no subnet is called so or fits.
        VerificationError: its outputs would not be those of the subnet.
    """
    model, subnets = _with_subnets(model)
    return extract_subnet(model, subnets, _index(subnets, which, flops, params))


@dataclass(frozen=True)
class Row:
    """One subnet of a switchable model.

    Attributes:
        structure: its channels and shares.
        active: whether the next forward runs it.
        own_bytes: memory of the tensors that it has for itself.
        kept_bytes: memory of the slices that are kept for it now.
    """

    structure: Structure
    active: bool
    own_bytes: int
    kept_bytes: int


@dataclass(frozen=True)
class Status:
    """The subnets of a model, the smallest first. Print it for a table."""

    rows: tuple[Row, ...]

    def __str__(self) -> str:
        return _table([row.structure for row in self.rows], self.rows)


def status(model: nn.Module) -> Status:
    """What subnets a model has, which one is active, and what is kept of them in memory.

    Raises:
        AutogateError: the model has no subnets.
    """
    _, subnets = _with_subnets(model)
    rows = []
    for number, (subnet, tree) in enumerate(zip(subnets.subnets, subnets.children(), strict=True)):
        own = sum(tensor.nbytes for tensor in (*tree.parameters(), *tree.buffers()))
        rows.append(Row(subnet.structure, number == subnets.active, own, subnet.kept_bytes))
    return Status(tuple(rows))


def _with_subnets(model: nn.Module) -> tuple[nn.Module, Subnets]:
    model = unwrap(model)
    found = subnets_of(model)
    if found is None:
        raise AutogateError(
            "it has no subnets.", where=type(model).__name__, remedy="Call autogate.subnets.fuse(model, found) first."
        )
    return model, found


def _index(subnets: Subnets, which: Which | None, flops: float | None, params: float | None) -> int:
    structures = [subnet.structure for subnet in subnets.subnets]
    names = [one.name for one in structures]
    if isinstance(which, str):
        if which not in names:
            raise AutogateError(f"no subnet is called {which!r}.", where="subnets", remedy=did_you_mean(which, names))
        return names.index(which)
    if isinstance(which, int) and not isinstance(which, bool):
        if not -len(names) <= which < len(names):
            raise AutogateError(f"there is no subnet {which}.", where="subnets", remedy=f"There are {len(names)}.")
        return range(len(names))[which]
    asked = {"FLOPs": which if flops is None else flops, "parameters": params}
    limits = {name: limit for name, limit in asked.items() if limit is not None}
    if not limits:
        raise AutogateError("no subnet is named.", where="subnets", remedy="Pass a name, a number or flops=0.3.")
    fitting = [
        number for number, one in enumerate(structures)
        if all(limit >= 1 or one.shares[name] <= limit + TOLERANCE for name, limit in limits.items())
    ]  # fmt: skip
    if not fitting:
        least = ", ".join(f"{share:.1%} of the {name}" for name, share in structures[0].shares.items())
        raise AutogateError(
            f"no subnet fits {' and '.join(f'{limit:.1%} of the {name}' for name, limit in limits.items())}.",
            where="subnets",
            remedy=f"The smallest, {names[0]!r}, has {least}.",
        )
    return fitting[-1]


def _table(structures: Sequence[Structure], rows: Sequence[Row] = ()) -> str:
    table = Table("subnet", *(name for name in structures[0].shares), *(("active", "own", "kept") if rows else ()))
    for column in table.columns[1:]:
        column.justify = "right"
    for number, one in enumerate(structures):
        more = []
        if rows:
            row = rows[number]
            more = ["*" if row.active else "", f"{row.own_bytes / 2**20:.1f} MB", f"{row.kept_bytes / 2**20:.1f} MB"]
        table.add_row(one.name, *(f"{share:.1%}" for share in one.shares.values()), *more)
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(table)
    return console.export_text().rstrip()
