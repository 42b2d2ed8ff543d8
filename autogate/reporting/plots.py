"""Figures of a run, drawn with matplotlib from the files in its folder."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps, rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from autogate.inspection import shortened
from autogate.training import BINS, EpochRow, GateRow, ImageUse, Result, RunInfo, SubnetRow, SubnetSize

WIDTH = 4.6
"""Width of a figure in inches. At this width labels are legible on a phone, where the figure fills the screen."""

DENSE, SLIM, OTHER = "#c9d3df", "#2f6db5", "#c8553d"

_STYLE: dict[Any, Any] = {
    "font.size": 9.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "svg.fonttype": "none",  # text stays text
}


def widths(info: RunInfo, last: GateRow) -> Figure:
    """Draw the output channels of each layer, in the dense model and now."""
    names = [layer.module for layer in info.layers]
    places = np.arange(len(names))
    figure, axes = _figure(0.9 + 0.17 * len(names))
    axes.barh(places, [layer.outputs for layer in info.layers], height=0.8, color=DENSE, label="dense")
    axes.barh(places, last.outputs, height=0.8, color=SLIM, label="left")
    return _of_layers(figure, axes, names, "output channels")


def _of_layers(figure: Figure, axes: Any, names: Sequence[str], label: str, title: str | None = None) -> Figure:
    """Name a figure's bars, one a layer from the top down; `title` is the legend's."""
    axes.set_yticks(np.arange(len(names)), [shortened(name, 26) for name in names], fontsize=7.5)
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_xlabel(label)
    figure.legend(loc="outside upper center", ncols=3, frameon=False, title=title)
    return figure


def subnet_widths(info: RunInfo, sizes: Sequence[SubnetSize]) -> Figure:
    """Draw the output channels of each layer in each subnet (Yang et al., figures 6 and 7), the widest behind."""
    names = [layer.module for layer in info.layers]
    places = np.arange(len(names))
    figure, axes = _figure(1.1 + 0.17 * len(names))
    for size, colour in zip(reversed(sizes), reversed(_shades(len(sizes))), strict=True):
        axes.barh(places, size.outputs, height=0.8, color=colour, label=f"{size.name} ({size.flops:.0%})")
    return _of_layers(figure, axes, names, "output channels", "subnet (share of the FLOPs)")


def subnet_accuracy(sizes: Sequence[SubnetSize], by_time: bool) -> Figure:
    """Draw the accuracy of the subnets over their FLOPs (figure 9) or over their latency (figure 8)."""
    figure, axes = _figure(2.9)
    shown = [(1e3 * one.seconds if by_time else 100 * one.flops, one) for one in sizes if one.seconds is not None]
    axes.plot([at for at, _ in shown], [one.accuracy for _, one in shown], "-", color=DENSE, zorder=1)
    for (at, one), colour in zip(shown, _shades(len(shown)), strict=True):
        axes.plot([at], [one.accuracy], "o", color=colour, markersize=6)
        axes.annotate(one.name, (at, one.accuracy), textcoords="offset points", xytext=(6, -11), fontsize=8)
    axes.margins(x=0.12, y=0.15)
    axes.set_xlabel("latency for one image (ms)" if by_time else "FLOPs (% of the dense model's)")
    axes.set_ylabel("accuracy (%)")
    return figure


def subnet_course(rows: Sequence[SubnetRow], sizes: Sequence[SubnetSize]) -> Figure:
    """Draw the accuracy of each subnet by epoch."""
    figure, axes = _figure(2.9)
    for size, colour in zip(sizes, _shades(len(sizes)), strict=True):
        own = [row for row in rows if row.name == size.name]
        points = [row.epoch for row in own], [row.accuracy for row in own]
        axes.plot(*points, "o-", color=colour, markersize=3, label=size.name)
    axes.set_xlabel("epoch")
    axes.set_ylabel("accuracy (%)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.legend(frameon=False, fontsize=8)
    return figure


def use_of_layers(use: ImageUse) -> Figure:
    """Draw which share of each layer's channels images never, sometimes and always use (Chen et al., figure 3)."""
    names = [layer.path for layer in use.layers]
    places, start = np.arange(len(names)), np.zeros(len(names))
    figure, axes = _figure(0.9 + 0.17 * len(names))
    for kind, colour in (("always", SLIM), ("sometimes", "#8fb8de"), ("never", DENSE)):
        counts = np.array([getattr(layer, kind) for layer in use.layers], dtype=float)
        sizes = np.array([layer.never + layer.sometimes + layer.always for layer in use.layers])
        axes.barh(places, 100 * counts / sizes, left=start, height=0.8, color=colour, label=kind)
        start += 100 * counts / sizes
    return _of_layers(figure, axes, names, "output channels (%)")


def channels_of_images(use: ImageUse) -> Figure:
    """Draw how many images use how many channels (Chen et al., figure 4)."""
    figure, axes = _figure(2.6)
    axes.hist(use.channels, bins=30, color=SLIM)
    axes.set_xlabel("channels computed, of all layers that choose")
    axes.set_ylabel("images")
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


def costs_of_images(use: ImageUse, target: float) -> Figure:
    """Draw how many images take which share of the FLOPs."""
    figure, axes = _figure(2.6)
    axes.hist([100 * share for share in use.shares], bins=30, color=SLIM)
    axes.axvline(100 * use.mean, color="k", linewidth=1, label="mean")
    axes.axvline(100 * target, color=OTHER, linestyle=":", linewidth=1.5, label="target")
    axes.set_xlabel("FLOPs (% of the dense model's)")
    axes.set_ylabel("images")
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(frameon=False, fontsize=8)
    return figure


def _shades(count: int) -> list[Any]:
    """A colour for each subnet: dark for small ones, light for the largest."""
    return [colormaps["viridis"](0.05 + 0.8 * at / max(1, count - 1)) for at in range(count)]


def gate_histogram(gates: Sequence[GateRow]) -> Figure:
    """Draw how many gates have which value, by epoch. The lowest row is the dead gates."""
    counts = np.array([(line.dead, *line.histogram) for line in gates], dtype=float).T
    epochs = [line.epoch for line in gates]
    figure, axes = _figure(2.9)
    edges = np.array([-0.1, *np.linspace(0, 1, BINS + 1)])
    steps = np.array([*epochs, epochs[-1] + 1]) - 0.5
    shown = np.ma.masked_equal(counts, 0)
    mesh = axes.pcolormesh(steps, edges, shown, cmap="YlGnBu", norm=LogNorm(1, max(counts.max(), 2)))
    axes.axhline(0, color="white", linewidth=2)
    axes.set_yticks([-0.05, 0.5, 1.0], ["dead", "0.5", "1"])
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.set_xlabel("epoch")
    axes.set_ylabel("gate")
    figure.colorbar(mesh, ax=axes, label="gates", pad=0.02)
    return figure


def course(info: RunInfo, rows: Sequence[EpochRow], result: Result | None) -> Figure:
    """Draw the shares left and the accuracy, by epoch."""
    epochs = [row.epoch for row in rows]
    figure, (left, right) = _figure(4.2, rows=2)
    during, after = ("with gates", "slim") if info.gates else ("in training", "at the end")
    left.plot(epochs, [100 * row.flops for row in rows], "o-", color=SLIM, markersize=3, label="FLOPs")
    if info.gates:
        left.plot(epochs, [100 * row.params for row in rows], "o-", color=OTHER, markersize=3, label="parameters")
    colours = {"FLOPs": SLIM, "parameters": OTHER}
    for name, share in info.targets.items():
        left.axhline(100 * share, color=colours.get(name, "0.5"), linestyle=":", linewidth=1, label=f"target, {name}")
    left.set_ylim(0, 105)
    left.set_ylabel("left (%)")
    left.legend(frameon=False, fontsize=8, ncols=2)
    right.plot(epochs, [row.accuracy for row in rows], "o-", color=SLIM, markersize=3, label=during)
    averaged = [(row.epoch, row.ema_accuracy) for row in rows if row.ema_accuracy is not None]
    if averaged:
        right.plot(*zip(*averaged, strict=True), "o-", color=OTHER, markersize=3, label="averaged weights")
    right.axhline(rows[0].accuracy, color="0.5", linestyle="--", linewidth=1, label="dense, at the start")
    if result is not None and result.accuracy is not None:
        right.plot([epochs[-1]], [result.accuracy], "D", color="k", markersize=5, label=after, zorder=3)
    right.set_ylabel("accuracy (%)")
    right.set_xlabel("epoch")
    right.legend(frameon=False, fontsize=8)
    right.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    return figure


def styled() -> Any:
    """A context with the style of the figures, for drawing and saving them."""
    return rc_context(_STYLE)


def as_svg(figure: Figure, name: str) -> str:
    """A figure as an svg element, the same text each time."""
    text = io.StringIO()
    with rc_context({**_STYLE, "svg.hashsalt": name}):
        figure.savefig(text, format="svg", metadata={"Date": None})
    return only_svg(text.getvalue())


def only_svg(document: str) -> str:
    """The svg element of a document."""
    return document[document.index("<svg") :]


def as_png(figure: Figure, path: Path) -> None:
    """Write a figure to a file."""
    with styled():
        figure.savefig(path, dpi=160)


def _figure(height: float, rows: int = 1) -> tuple[Figure, Any]:
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, sharex=rows > 1)
