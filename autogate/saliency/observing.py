"""What a model chooses on given images: their cost, the use of channels, and the threshold that a budget takes."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from autogate.inputs import run_on
from autogate.saliency.bank import SaliencyBank
from autogate.saliency.counting import Cost, LayerUse, MeanUse, Note
from rewriters import AutogateError
from rewriters.interrupts import let_signals_in
from rewriters.recording import set_modes

CLOSE_ENOUGH = 1e-3
"""How far from the budget the mean cost may stay."""

MOST_RUNS = 30
"""Thresholds that are tried."""


@dataclass(frozen=True)
class Use:
    """What images use of a model. Print it for a table.

    Attributes:
        layers: those that choose, in the order they run.
        shares: the share of the FLOPs that each image takes, float64 of shape (images,).
        channels: how many channels are computed for each image, over all layers that choose, float64 of that shape.
    """

    layers: tuple[LayerUse, ...]
    shares: Tensor = field(repr=False)
    channels: Tensor = field(repr=False)

    @property
    def mean(self) -> MeanUse:
        """The same on average."""
        return MeanUse(len(self.shares), float(self.shares.mean()), self.layers)

    def __str__(self) -> str:
        table = Table("layer", "never", "sometimes", "always", "used")
        for column in table.columns[1:]:
            column.justify = "right"
        for layer in self.layers:
            counts = (str(count) for count in (layer.never, layer.sometimes, layer.always))
            table.add_row(layer.path, *counts, f"{layer.mean:.0%}")
        console = Console(width=100, record=True, file=io.StringIO())
        low, mean, high = (float(value) for value in (self.shares.min(), self.shares.mean(), self.shares.max()))
        console.print(f"FLOPs of {len(self.shares)} images: {mean:.1%} on average, {low:.1%} to {high:.1%}")
        console.print(table)
        return console.export_text().rstrip()


def use_of(model: nn.Module, bank: SaliencyBank, batches: Iterable[Any]) -> Use:
    """How the images of these batches use the model's channels. The bank keeps the mean.

    Raises:
        AutogateError: there are no batches, or scores are NaN or infinite.
    """
    counts, shares, channels = _Counts(bank), [], []
    for cost in costs(model, bank, batches):
        shares.append((cost.images / cost.dense).cpu())
        channels.append(bank.counting.computed(bank.notes.calls).cpu())
        counts.add(bank.notes.calls)
    found = Use(counts.layers(), torch.cat(shares), torch.cat(channels))
    bank.keep(found.mean)
    return found


def known_use(bank: SaliencyBank) -> MeanUse | None:
    """The mean use that was measured last with the weights as they are; else that of the latest forward.

    Returns:
        None if no forward has run either.
    """
    if (kept := bank.kept) is not None or not bank.notes.has_scores:
        return kept
    cost, counts = bank.cost_of_images(), _Counts(bank)
    counts.add(bank.notes.calls)
    return MeanUse(len(cost.images), float(cost.images.mean()) / cost.dense, counts.layers())


class _Counts:
    """How often each channel of the layers that choose was on."""

    def __init__(self, bank: SaliencyBank):
        self._paths = {module.layer: path for path, module in zip(bank.paths, bank.saliency_modules, strict=True)}
        self._used = {module.layer: torch.zeros(module.expand.out_features) for module in bank.saliency_modules}
        self._rows = dict.fromkeys(self._used, 0)

    def add(self, calls: Sequence[Note]) -> None:
        """Count the calls of a forward."""
        for call in calls:
            if call.made is not None:
                made = call.made.reshape(-1, call.made.shape[-1])
                self._used[call.layer] += made.sum(0).cpu()
                self._rows[call.layer] += len(made)

    def layers(self) -> tuple[LayerUse, ...]:
        """The use of each layer so far."""
        found = []
        for layer, counts in self._used.items():
            seen = self._rows[layer]
            never, always = int((counts == 0).sum()), int((counts == seen).sum())
            mean = float(counts.mean()) / seen
            found.append(LayerUse(self._paths[layer], never, len(counts) - never - always, always, mean))
        return tuple(found)


def meet(model: nn.Module, bank: SaliencyBank, flops: float, batches: Iterable[Any]) -> float:
    """Set the threshold with which the images of these batches take `flops` of the FLOPs on average.

    Returns:
        The share that they take.

    Raises:
        AutogateError: there are no batches, scores are NaN or infinite, or the share is below what every image takes.
            The threshold is left as it was.
    """
    before, measured = float(bank.threshold), bank.measured
    tried: dict[float, MeanUse] = {}
    batches = list(batches) if iter(batches) is batches else batches

    def share(threshold: float) -> float:
        bank.set_threshold(threshold)
        tried[threshold] = use_of(model, bank, batches).mean
        return tried[threshold].share

    try:
        least = share(torch.inf)
        if least > flops:
            raise AutogateError(
                f"flops is {flops:g}, and every image takes {least:.1%} of the FLOPs.",
                where=type(model).__name__,
                remedy="Ask for a larger share.",
            )
        found, threshold = _nearest(share, flops, before)
        bank.set_threshold(threshold)
        bank.keep(tried[threshold])
    except BaseException:
        bank.set_threshold(before)
        bank.measured = measured
        raise
    return found


def _nearest(share: Callable[[float], float], flops: float, start: float) -> tuple[float, float]:
    """The share nearest to `flops` among those that were tried, and its threshold; higher ones cost less."""
    tried = [(share(start), start)]
    side, width = (1 if tried[0][0] > flops else -1), 0.25
    while (tried[-1][0] - flops) * side > 0 and len(tried) < MOST_RUNS / 2:  # find one on the other side
        threshold = tried[-1][1] + side * width
        tried.append((share(threshold), threshold))
        width *= 2
    (_, one), (_, other) = tried[-1], tried[-2] if len(tried) > 1 else tried[-1]
    low, high = sorted((one, other))
    while min(abs(found - flops) for found, _ in tried) > CLOSE_ENOUGH and len(tried) < MOST_RUNS and low < high:
        middle = (low + high) / 2
        tried.append((share(middle), middle))
        low, high = (middle, high) if tried[-1][0] > flops else (low, middle)
    return min(tried, key=lambda one: abs(one[0] - flops))


def costs(model: nn.Module, bank: SaliencyBank, batches: Iterable[Any]) -> Iterator[Cost]:
    """Run a model on batches in eval mode; after each, its cost, while the bank's notes have its calls.

    Modes are restored at the end.

    Raises:
        AutogateError: there are no batches, or scores are NaN or infinite.
    """
    before = set_modes(model, False)
    given = 0
    try:
        with torch.no_grad():
            for batch in batches:
                let_signals_in()
                given += 1
                run_on(model, batch)
                yield bank.cost_of_images()
    finally:
        set_modes(model, before)
    if not given:
        raise AutogateError("`batches` yields none.", where="adaptive", remedy="Pass a list or a loader, not yet used.")
