"""`what_if`: what budgets would come to, before any work: least shares, widths, and the time that they really take."""

from __future__ import annotations

import copy
import dataclasses
import io
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor, nn

from autogate.api import finalize, gated_summary, gates, prepare
from autogate.budget import Activations, Flops, Params, Resource
from autogate.closing import close
from autogate.criteria import By
from autogate.inputs import as_call
from autogate.inspection import Duration, time_in_turns
from autogate.lock import locked
from autogate.steering import fewest_live
from rewriters import AutogateError, Pin, samples_in


@dataclass(frozen=True)
class Variant:
    """A slim model that a share would come to.

    Attributes:
        asked: the share that was asked for; None for the least that can be reached.
        shares: what is left of each resource, by its name; empty if the share is out of reach.
        widths: output channels of each layer, by its path.
        latency: seconds of a forward over the example inputs.
        problem: why there is no such model, or why it couldn't be timed; empty if all is well.
    """

    asked: float | None
    shares: Mapping[str, float]
    widths: Mapping[str, int]
    latency: Duration | None
    problem: str = ""


@dataclass(frozen=True)
class WhatIf:
    """What budgets would come to. Print `table()`.

    Attributes:
        resource: what the shares are of.
        criterion: what chose the channels.
        least: the smallest share of each resource that can be reached, by its name.
        pins: why the other channels stay.
        widths: output channels of each layer of the dense model, by its path.
        latency: seconds of the dense model's forward over the example inputs; None if it couldn't be timed.
        samples: samples in the example inputs.
        threads: CPU threads.
        device: the model's device.
        variants: the slim models, the least one last.
    """

    resource: str
    criterion: str
    least: Mapping[str, float]
    pins: tuple[Pin, ...]
    widths: Mapping[str, int]
    latency: Duration | None
    samples: int
    threads: int
    device: str
    variants: tuple[Variant, ...]

    def table(self) -> str:
        """The shares with what they come to, the widths of each layer, and what pins the rest, as text."""
        console = Console(width=110, record=True, file=io.StringIO())
        console.print(_shares(self))
        for variant in self.variants:
            if variant.problem:
                console.print(f"{_name(variant)}: {variant.problem}", markup=False, highlight=False)
        console.print(_widths(self))
        if self.pins:
            console.print(_pins(self))
        return console.export_text()

    def to_json(self) -> str:
        """All of it as JSON."""
        return json.dumps(dataclasses.asdict(self), indent=1)


@locked
def what_if(
    model: nn.Module,
    example_inputs: Any = None,
    shares: Iterable[float] = (0.8, 0.5, 0.3, 0.1),
    *,
    of: Literal["flops", "params", "activations"] = "flops",
    by: By = "l1",
    batches: Iterable[Any] | None = None,
    loss: Callable[..., Tensor] | None = None,
    seconds: float = 0.3,
    **options: Any,
) -> WhatIf:
    """Find out what budgets would come to before anything is trained. The model is left as it was.

    For each share a copy of the model is closed by a criterion, made slim and timed; all of them take turns, so that
    they see the machine in the same state.

        >>> import timm, torch, autogate
        >>> found = autogate.what_if(timm.create_model("test_resnet"), torch.randn(1, 3, 64, 64), (0.5,), seconds=0.01)
        >>> round(found.variants[0].shares["FLOPs"], 2), sorted(found.least)
        (0.5, ['FLOPs', 'activations', 'parameters'])

    Args:
        model: the dense model.
        example_inputs: as for `prepare`; latency is measured on them as they are.
        shares: shares in (0, 1].
        of: the resource that the shares are of.
        by: the criterion, see `autogate.close`.
        batches: batches, for criteria that need some.
        loss: their loss, for criteria that need one.
        seconds: minimum time to measure each model for.
        options: further arguments of `prepare`: `round_to`, `ignore`, `limits`, `shortcuts`, `embed`.

    Raises:
        AutogateError: as for `prepare` and `close`; but a share out of reach is told in its `Variant`.
    """
    args = as_call(example_inputs, model)
    whole: dict[str, Any] = {of: 1.0}
    gated = prepare(copy.deepcopy(model), args[1] or args[0], **whole, **options)
    bank = gates(gated)
    resources = {
        name: kind(bank.channel_map, gated, bank.added)
        for name, kind in (("flops", Flops), ("params", Params), ("activations", Activations))
    }
    fewest = fewest_live(bank.learner.groups, bank.channel_map)
    reach = resources[of].share(fewest)
    given = None if batches is None else list(batches)
    twins: dict[float | None, nn.Module | str] = {}
    for share in shares:
        budget: dict[str, Any] = {of: share}
        try:
            twins[share] = close(copy.deepcopy(gated), by, batches=given, loss=loss, **budget)
        except AutogateError as error:
            if not 0 < share <= reach:  # it is something else
                raise
            twins[share] = str(error)
    twins[None] = narrowest = copy.deepcopy(gated)
    gates(narrowest).close(torch.nonzero(~fewest).flatten())
    widths = {layer.module: layer.all_outputs for layer in gated_summary(gated).layers}
    drafts = [_draft(share, twin, resources) for share, twin in twins.items()]
    slim = [finalize(twin, warn=False) for twin in twins.values() if isinstance(twin, nn.Module)]
    dense, *times = time_in_turns([one.eval() for one in (copy.deepcopy(model), *slim)], args, seconds)
    timed = iter(times)
    return WhatIf(
        resource=resources[of].name,
        criterion=by if isinstance(by, str) else getattr(by, "__name__", type(by).__name__),
        least={resource.name: resource.share(fewest) for resource in resources.values()},
        pins=bank.channel_map.pins,
        widths=widths,
        latency=dense if isinstance(dense, Duration) else None,
        samples=samples_in(*args),
        threads=torch.get_num_threads(),
        device=str(bank.alpha.device),
        variants=tuple(draft if draft.problem else _with_time(draft, next(timed)) for draft in drafts),
    )


def _draft(share: float | None, twin: nn.Module | str, resources: Mapping[str, Resource]) -> Variant:
    """A variant without its time."""
    if isinstance(twin, str):
        return Variant(share, {}, {}, None, twin)
    live = gates(twin).live.cpu()
    left = {resource.name: resource.share(live) for resource in resources.values()}
    return Variant(share, left, {layer.module: layer.outputs for layer in gated_summary(twin).layers}, None)


def _with_time(draft: Variant, time: Duration | str) -> Variant:
    if isinstance(time, Duration):
        return dataclasses.replace(draft, latency=time)
    return dataclasses.replace(draft, problem=time)


def _name(variant: Variant) -> str:
    return "least" if variant.asked is None else f"{variant.asked:g}"


def _shares(found: WhatIf) -> Table:
    names = list(found.least)
    table = Table(
        f"{found.resource} asked for", *names, f"latency of {found.samples} (ms)", "of the dense one",
        title=f"What is left, by {found.criterion}",
        caption=f"Latency: median on {found.device}, {found.threads} threads. Least: the fewest channels that connect "
        "inputs to outputs.",
    )  # fmt: skip
    for column in table.columns[1:]:
        column.justify = "right"
    table.add_row("dense", *["100.0%"] * len(names), _milliseconds(found.latency), "")
    for variant in found.variants:
        shares = [f"{variant.shares[name]:.1%}" if name in variant.shares else "-" for name in names]
        part = f"{variant.latency.median / found.latency.median:.2f}" if variant.latency and found.latency else "-"
        table.add_row(_name(variant), *shares, _milliseconds(variant.latency), part)
    return table


def _milliseconds(latency: Duration | None) -> str:
    return "-" if latency is None else f"{latency.median * 1e3:.3g}"


def _widths(found: WhatIf) -> Table:
    there = [variant for variant in found.variants if variant.widths]
    table = Table("layer", "dense", *map(_name, there), title="Output channels")
    for column in table.columns[1:]:
        column.justify = "right"
    for layer, width in found.widths.items():
        table.add_row(escape(layer), str(width), *(str(variant.widths[layer]) for variant in there))
    return table


def _pins(found: WhatIf) -> Table:
    table = Table("pinned at", "op", "reason", title="What keeps the rest")
    for pin in found.pins:
        table.add_row(escape(pin.place), escape(pin.op), escape(pin.reason))
    return table
