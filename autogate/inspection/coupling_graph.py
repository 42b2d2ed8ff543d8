"""Draw which kernels are coupled through which groups of channels."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import networkx as nx

from rewriters import AutogateError, ChannelMap

FORMATS = ("svg", "png", "pdf", "ps", "eps", "jpg", "jpeg", "tif", "tiff", "webp")
"""Suffixes of files that matplotlib draws to."""


def check_drawable(path: Path) -> None:
    """Raise if the coupling graph can't be drawn to this file.

    Raises:
        AutogateError: matplotlib is not installed, or can't write this format.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise AutogateError("drawing the coupling graph needs matplotlib.", remedy="pip install 'autogate[graph]'")
    if path.suffix.removeprefix(".").lower() not in FORMATS:
        raise AutogateError(
            f"no picture is drawn in the format {path.suffix!r}.",
            where=str(path),
            remedy=f"Formats are {', '.join(FORMATS)}.",
        )


def draw_coupling_graph(channel_map: ChannelMap, path: Path) -> None:
    """Draw which kernels are coupled through which groups of channels.

    Kernels are on the left in the order they run, groups on the right, each as a circle whose size grows with its
    number of channels. Beside it are the group's number, as `autogate inspect` lists it, and its number of channels.
    Lines connect a kernel to the groups that it outputs (blue) and reads (orange). If graphviz (and pydot or
    pygraphviz) is installed, its layout is used.

    Args:
        channel_map: the model's channels.
        path: path of the file, whose suffix sets the format.

    Raises:
        AutogateError: matplotlib is not installed, or can't write this format.
    """
    check_drawable(path)
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
    for node, width, size in zip(groups, widths, sizes, strict=True):
        beside = (size**0.5 / 2 + 3, 0)  # points, from the circle's centre
        label = f"{node[1]}: {width}"
        axes.annotate(label, places[node], beside, textcoords="offset points", va="center", fontsize=7)
    axes.plot([], [], color="tab:blue", label="the kernel outputs these channels")
    axes.plot([], [], color="tab:orange", label="the kernel reads these channels")
    figure.legend(loc="outside upper center", ncols=2, frameon=False)
    axes.margins(x=0.25, y=0.02)
    axes.set_axis_off()
    figure.savefig(path)


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
