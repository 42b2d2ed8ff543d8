"""What a model chooses on given images: their cost, the use of channels, and the threshold that a budget takes."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from autogate.inputs import run_on
from autogate.saliency.bank import SaliencyBank
from autogate.saliency.counting import Cost
from rewriters import AutogateError
from rewriters.interrupts import let_signals_in
from rewriters.recording import set_modes

CLOSE_ENOUGH = 1e-3
"""How far from the budget the mean cost may stay."""

MOST_RUNS = 30
"""Thresholds that are tried."""


@dataclass(frozen=True)
class LayerUse:
    """How the images use the channels of a layer.

    Attributes:
        path: of the convolution.
        never, sometimes, always: number of channels that no image, some or all of them use.
        mean: the share of its channels that an image uses on average.
    """

    path: str
    never: int
    sometimes: int
    always: int
    mean: float


@dataclass(frozen=True)
class Use:
    """What images use of a model. Print it for a table.

    Attributes:
        layers: those that choose, in the order they run.
        shares: the share of the FLOPs that each image takes, float64 of shape (images,).
    """

    layers: tuple[LayerUse, ...]
    shares: Tensor = field(repr=False)

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
    """How the images of these batches use the model's channels.

    Raises:
        AutogateError: there are no batches, or scores are NaN.
    """
    used = [torch.zeros(module.expand.out_features) for module in bank.saliency_modules]
    rows = [0] * len(used)
    number = {module.layer: place for place, module in enumerate(bank.saliency_modules)}
    shares = []
    for cost in costs(model, bank, batches):
        shares.append((cost.images / cost.dense).cpu())
        for call in bank.notes.calls:
            if call.scores is not None:
                place, made = number[call.layer], (call.scores > 0).view(-1, call.scores.shape[-1])
                used[place] += made.sum(0).cpu()
                rows[place] += len(made)
    layers = []
    for path, counts, seen in zip(bank.paths, used, rows, strict=True):
        never, always = int((counts == 0).sum()), int((counts == seen).sum())
        mean = float(counts.mean()) / seen
        layers.append(LayerUse(path, never, len(counts) - never - always, always, mean))
    return Use(tuple(layers), torch.cat(shares))


def meet(model: nn.Module, bank: SaliencyBank, flops: float, batches: Iterable[Any]) -> float:
    """Set the threshold with which the images of these batches take `flops` of the FLOPs on average.

    Returns:
        The share that they take.

    Raises:
        AutogateError: there are no batches, scores are NaN, or the share is below what every image takes. The
            threshold is left as it was.
    """
    before = float(bank.threshold)
    batches = list(batches) if iter(batches) is batches else batches

    def share(threshold: float) -> float:
        bank.set_threshold(threshold)
        found = torch.cat([(cost.images / cost.dense).cpu() for cost in costs(model, bank, batches)])
        return float(found.mean())

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
    except BaseException:
        bank.set_threshold(before)
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
        AutogateError: there are no batches, or scores are NaN.
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
