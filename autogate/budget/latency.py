"""Latency as a resource: time interpolated in tables of each layer's time at a grid of widths.

`autogate.budget.timing` measures the tables. A layer that runs once for each channel of other layers is timed for all
of them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from torch import Tensor, nn

from autogate.budget.products import Activations
from autogate.budget.resource import Resource, SideCounts
from autogate.budget.timing import Layer, Timings, machine, time_model
from autogate.inputs import Inputs
from rewriters import ChannelMap, Kernel, Side

T = TypeVar("T")

GRID = (0.125, 0.25, 0.5, 0.75, 1.0)
"""Widths at which a layer is timed, as parts of its full width."""


class Latency(Resource):
    """The time of a forward pass over one sample, from tables of layer timings.

    Between the widths in a table, time is interpolated, starting from zero for a side without channels. It is made to
    grow with both widths, which measured times may not do. The time that the model spends outside of its convolutions
    and linear layers (norms, activations, sums) is taken to be proportional to the bytes that these layers output.

    Args:
        sides: counts of live channels along both sides of each layer's kernel; side 2 i is dimension 0 of layer i's
            kernel, side 2 i + 1 is dimension 1.
        widths: float64, shape (layers, 2, points): the widths timed along each dimension, ascending from 0 to the full
            width.
        seconds: float64, shape (layers, points, points).
        rest: seconds spent outside of the layers with every class alive.
        rest_goes_with: the resource that these seconds are proportional to.
        original: bool, shape (layers,): False for layers that prepare added.
    """

    name = "latency"

    def __init__(
        self, sides: SideCounts, widths: Tensor, seconds: Tensor, rest: float, rest_goes_with: Resource,
        original: Tensor,
    ):  # fmt: skip
        seconds = seconds.cummax(1).values.cummax(2).values if len(seconds) else seconds
        super().__init__(sides.size, whole=float(seconds[original, -1, -1].sum()) + rest)
        self._sides = sides
        self._widths = widths
        self._seconds = seconds
        self._rest = rest
        self._rest_goes_with = rest_goes_with

    @classmethod
    def measure(cls, channel_map: ChannelMap, model: nn.Module, inputs: Inputs, added: Collection[str] = ()) -> Latency:
        """Time the model and its layers as they are: on their device, in their dtype, in eval mode, for one sample.

        In a distributed run with an initialised process group, all processes use the timings of the first.

        Args:
            channel_map: classes and kernels.
            model: the model that the map was made from.
            inputs: a batch of samples; the first one is used.
            added: weights of layers that were not in the user's model; shares are relative to the model without them.
        """
        layers = _layers(channel_map, model)
        whole, tables = _from_first_process(lambda: _measure(model, layers, inputs))
        widths = torch.tensor([layer.widths for layer in layers], dtype=torch.float64).reshape(-1, 2, len(GRID) + 1)
        seconds = torch.tensor(tables, dtype=torch.float64).reshape(-1, len(GRID) + 1, len(GRID) + 1)
        rest = max(0.0, whole - float(seconds[:, -1, -1].sum()))
        original = torch.tensor([layer.kernel.weight not in added for layer in layers], dtype=torch.bool)
        activations = Activations(channel_map, model, added)
        sides = SideCounts.along(channel_map, [side for layer in layers for side in layer.sides])
        return cls(sides, widths, seconds, rest, activations, original)

    def value(self, live: Tensor) -> Tensor:
        """Seconds."""
        return self._interpolate(live)[0].sum() + self._rest * self._rest_goes_with.share(live)

    def price(self, live: Tensor) -> Tensor:
        """Seconds per channel: the slopes towards narrower layers, at the widths that `live` leaves."""
        _, slopes = self._interpolate(live)
        rest = self._rest_goes_with.price(live) * (self._rest / max(self._rest_goes_with.whole, 1.0))
        return self._sides.per_class(slopes.flatten()) + rest

    def _interpolate(self, live: Tensor) -> tuple[Tensor, Tensor]:
        """Seconds of each layer, shape (layers,), and their slopes along both widths, shape (layers, 2)."""
        counts = self._sides.counts(live).view(-1, 2, 1)
        cell = (torch.searchsorted(self._widths, counts) - 1).clamp(min=0)
        low, high = self._widths.gather(2, cell), self._widths.gather(2, cell + 1)
        length = (high - low).squeeze(2)
        part = ((counts - low) / (high - low)).squeeze(2)
        layer = torch.arange(len(cell))
        row, column = cell.squeeze(2).unbind(1)
        corner = [[self._seconds[layer, row + down, column + right] for right in (0, 1)] for down in (0, 1)]
        left, right = (torch.lerp(corner[0][side], corner[1][side], part[:, 0]) for side in (0, 1))
        top, bottom = (torch.lerp(corner[down][0], corner[down][1], part[:, 1]) for down in (0, 1))
        slopes = torch.stack([bottom - top, right - left], 1) / length
        return torch.lerp(left, right, part[:, 1]), slopes


@dataclass(frozen=True)
class _Layer:
    """A convolution or linear layer that can be timed on its own."""

    kernel: Kernel
    module: Layer
    shape: torch.Size
    free: tuple[bool, bool]
    """Which of the kernel's first two dimensions have channels that can be removed."""

    @property
    def sides(self) -> tuple[Side, Side]:
        return Side(self.kernel.weight, 0), Side(self.kernel.weight, 1)

    @property
    def widths(self) -> list[list[float]]:
        """The grid along both dimensions, in channels."""
        return [[0.0, *(float(max(1, round(part * size))) for part in GRID)] for size in self.shape[:2]]


def _layers(channel_map: ChannelMap, model: nn.Module) -> list[_Layer]:
    """The kernels that are the weight of such a layer. All others count in the rest."""
    found = []
    for kernel in channel_map.kernels:
        path, _, name = kernel.weight.rpartition(".")
        module = model.get_submodule(path)
        if name == "weight" and kernel.macs and isinstance(module, Layer):
            first, second = (Side(kernel.weight, dim) in channel_map.classes for dim in (0, 1))
            found.append(_Layer(kernel, module, module.weight.shape, (first, second)))
    return found


def _table(layer: _Layer, calls: Sequence[Tensor], timings: Timings) -> list[list[float]]:
    """Seconds of all calls of a layer at each pair of widths. The first row and column are for width 0.

    A dimension without removable channels is timed only at its full width.
    """
    rows, columns = layer.widths
    table = [[0.0] * len(columns)]
    for row in rows[1:]:
        width = [
            [int(size) if free else whole for free, size, whole in zip(layer.free, pair, layer.shape, strict=False)]
            for pair in ((row, column) for column in columns[1:])
        ]
        whole_groups = not layer.kernel.mixes
        table.append([0.0, *(sum(timings.layer(layer.module, pair, whole_groups, x) for x in calls) for pair in width)])
    return table


def _measure(model: nn.Module, layers: Sequence[_Layer], inputs: Inputs) -> tuple[float, list[list[list[float]]]]:
    """Seconds of the whole model, and the table of each layer. A terminal sees a progress bar."""
    console, tables = Console(stderr=True), []
    columns = TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn()
    # It is drawn between timings only: a thread that draws it would take time from what is timed.
    with Progress(
        *columns, console=console, transient=True, auto_refresh=False, disable=not console.is_terminal
    ) as progress:
        task = progress.add_task("latency: timing the whole model", total=len(layers))
        progress.refresh()
        whole, calls = time_model(model, [layer.module for layer in layers], inputs)
        with Timings(machine(model)) as timings:
            for layer in layers:
                name = layer.kernel.weight.removesuffix(".weight")
                progress.update(task, description=f"latency: timing {name} at several widths", refresh=True)
                tables.append(_table(layer, calls[layer.module], timings))
                progress.advance(task)
    return whole, tables


def _from_first_process(make: Callable[[], T]) -> T:
    """What `make` returns in the first process of a distributed run, in all processes."""
    if not (dist.is_available() and dist.is_initialized()):
        return make()
    made = [make() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(made)
    return made[0]  # type: ignore[return-value]
