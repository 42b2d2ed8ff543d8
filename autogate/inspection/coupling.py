"""What could go of a model, read off its channels: groups, pins, FLOPs by stage, the picture of what is coupled."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import networkx as nx
import torch
from torch import Tensor, nn

from autogate.budget import Flops, Params, Shares, Target, Targets
from autogate.inputs import as_call
from autogate.lock import locked
from autogate.naming import named_by
from autogate.slim import AnalysisOptions, add_shortcut_convolutions, analyse_with_dry_run
from autogate.steering import Narrowing, groups_of, part_alike
from rewriters import AutogateError, ChannelMap, Pin, UndoLog


@dataclass(frozen=True)
class GroupOfChannels:
    """Channels that lie on the same sides.

    Attributes:
        width: how many there are.
        made_by, read_by: the kernels on whose output and input side they lie.
        price: FLOPs that go with one of them, all others staying.
    """

    width: int
    made_by: tuple[str, ...]
    read_by: tuple[str, ...]
    price: float


@dataclass(frozen=True)
class Stage:
    """FLOPs of a part of the model: of the whole model, and at the budget."""

    name: str
    all_flops: float
    flops: float


@dataclass(frozen=True)
class Inspection:
    """What `inspect_model` found.

    Attributes:
        channel_map: the model's channels.
        groups: those that may go.
        pins: why the others stay.
        stages: where the FLOPs are, in the order the layers run.
        keep: part of its channels that every group keeps to meet the budget.
        flops, all_flops: multiply-adds of one sample, at that and of the whole model.
        params, all_params: parameters likewise.
        least: share of the FLOPs that is left with every channel gone that may go.
    """

    channel_map: ChannelMap
    groups: tuple[GroupOfChannels, ...]
    pins: tuple[Pin, ...]
    stages: tuple[Stage, ...]
    keep: float
    flops: float
    all_flops: float
    params: float
    all_params: float
    least: float


@locked
def inspect_model(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    flops: float = 0.5,
    ignore: Iterable[str] = (),
    shortcuts: str | tuple[str, ...] = "shared",
    by_layer: bool = False,
) -> Inspection:
    """What may go of a model and what a budget would leave of it; the model is as it was.

    Args:
        model, example_inputs, flops, ignore, shortcuts: as for `prepare`.
        by_layer: a stage for each layer.

    Raises:
        AutogateError: as for `prepare`; a budget out of reach is met as nearly as can be.
    """
    Shares(flops=flops)  # raises for a share that is none
    ignored = dict.fromkeys(named_by(model, ignore), "the caller asked for it")
    options = AnalysisOptions(as_call(example_inputs, model), ignored, shortcuts)
    undo_log = UndoLog()
    try:
        added = {shortcut.weight for shortcut in add_shortcut_convolutions(model, options, undo_log)}
        channel_map = analyse_with_dry_run(model, options).channel_map
        cost, params = Flops(channel_map, model, added), Params(channel_map, model)
    finally:
        undo_log.undo()
    narrowing = Narrowing(groups_of(channel_map, round_to=1))
    keep = part_alike(narrowing, Targets([Target(cost, flops)])) or 0.0
    live = narrowing.live(keep)
    everything = torch.ones_like(live)
    return Inspection(
        channel_map=channel_map,
        groups=_groups(channel_map, cost.drop(everything)),
        pins=channel_map.pins,
        stages=_stages(channel_map, live, by_layer),
        keep=keep,
        flops=float(cost.value(live)),
        all_flops=cost.whole,
        params=float(params.value(live)),
        all_params=float(params.value(everything)),
        least=cost.least,
    )


def _groups(channel_map: ChannelMap, drop: Tensor) -> tuple[GroupOfChannels, ...]:
    found = []
    for group in channel_map.groups():
        sides = set(group.sides)
        kernels = channel_map.kernels
        made_by = tuple(kernel.module for kernel in kernels if kernel.output_side in sides)
        read_by = tuple(kernel.module for kernel in kernels if kernel.input_side in sides and kernel.mixes)
        price = float(drop[list(group.classes)].mean())
        found.append(GroupOfChannels(len(group.classes), made_by, read_by, price))
    return tuple(found)


def _stages(channel_map: ChannelMap, live: Tensor, by_layer: bool) -> tuple[Stage, ...]:
    whole: dict[str, float] = {}
    left: dict[str, float] = {}
    everything = torch.ones_like(live)
    for kernel in channel_map.kernels:
        name = kernel.module if by_layer else stage_of(kernel.module)
        for total, alive in ((whole, everything), (left, live)):
            total[name] = total.get(name, 0.0) + channel_map.macs(kernel, alive)
    return tuple(Stage(name, total, left[name]) for name, total in whole.items())


def stage_of(module: str) -> str:
    """The part of the model that a module belongs to: its outermost parent, with its number where it has one.

    >>> stage_of("layer1.0.conv1"), stage_of("blocks.3.0.conv_pw"), stage_of("fc")
    ('layer1', 'blocks.3', 'fc')
    """
    first, *rest = module.split(".")
    return f"{first}.{rest[0]}" if rest and rest[0].isdecimal() and not first[-1:].isdecimal() else first


def draw(channel_map: ChannelMap, path: Path) -> None:
    """Draw which kernels are coupled through which groups of channels.

    Kernels stand on the left in the order they run, groups on the right, each a dot as large as the group has
    channels; a line leads from a kernel to the groups it makes (blue) and reads (orange). With graphviz (and
    pydot or pygraphviz) its layout is taken.

    Args:
        path: of the file, whose ending tells the format.

    Raises:
        AutogateError: matplotlib is not installed, or doesn't write such files.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise AutogateError("drawing needs matplotlib.", remedy="pip install 'autogate[graph]'")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    graph = channel_map.graph()
    kernels = [node for node in graph if node[0] == "kernel"]
    groups = [node for node in graph if node[0] == "group"]
    height = max(4.0, 0.22 * max(len(kernels), len(groups)))
    figure = Figure(figsize=(12.0, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    places = _layout(graph, kernels, groups)
    for end, colour in (("output", "tab:blue"), ("input", "tab:orange")):
        edges = [(a, b) for a, b, found in graph.edges(data="end") if found == end]
        nx.draw_networkx_edges(graph, places, edgelist=edges, edge_color=colour, ax=axes, alpha=0.7)
    widths = [graph.nodes[node]["width"] for node in groups]
    sizes = [20 + 3 * width**0.75 for width in widths]
    nx.draw_networkx_nodes(graph, places, nodelist=groups, node_size=sizes, node_color="tab:gray", ax=axes)
    nx.draw_networkx_nodes(graph, places, nodelist=kernels, node_size=12, node_shape="s", node_color="k", ax=axes)
    for node in kernels:
        axes.annotate(node[1], places[node], (-6, 0), textcoords="offset points", ha="right", va="center", fontsize=7)
    for node, width in zip(groups, widths, strict=True):
        axes.annotate(str(width), places[node], (9, 0), textcoords="offset points", va="center", fontsize=7)
    axes.plot([], [], color="tab:blue", label="the kernel makes these channels")
    axes.plot([], [], color="tab:orange", label="the kernel reads these channels")
    figure.legend(loc="outside upper center", ncols=2, frameon=False)
    axes.margins(x=0.25, y=0.02)
    axes.set_axis_off()
    try:
        figure.savefig(path)
    except ValueError as error:
        raise AutogateError(f"{error}.", where=str(path)) from error


def _layout(graph: nx.Graph, kernels: list[Any], groups: list[Any]) -> dict[Any, tuple[float, float]]:
    if not graph:
        return {}
    for layout in (nx.nx_agraph.graphviz_layout, nx.nx_pydot.graphviz_layout):
        try:
            return layout(graph, prog="dot")
        except (ImportError, OSError):
            continue
    places = {node: (0.0, -float(index)) for index, node in enumerate(kernels)}
    means = {}
    for node in groups:
        heights = [places[kernel][1] for kernel in graph[node]]
        means[node] = sum(heights) / len(heights) if heights else 0.0
    for rank, node in enumerate(sorted(groups, key=lambda node: -means[node])):
        places[node] = (1.0, -rank * max(1.0, (len(kernels) - 1) / max(1, len(groups) - 1)))
    return places
