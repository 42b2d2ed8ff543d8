"""Draw which kernels are coupled through which groups of channels."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import networkx as nx

from rewriters import AutogateError, ChannelMap

FORMATS = ("svg", "png", "pdf", "ps", "eps", "jpg", "jpeg", "tif", "tiff", "webp")
"""Suffixes of files that matplotlib draws to."""

WIDE = 12.0
"""Width of a picture in inches, if it isn't for a page that phones show."""

ROW, TOP = 0.22, 0.6
"""Height of a row, and of the legend above, in inches."""

LETTERS = 5.6
"""Letters of a kernel's name to each inch of a picture's width."""


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


def draw_coupling_graph(channel_map: ChannelMap, path: Path, width: float = WIDE) -> None:
    """Draw which kernels are coupled through which groups of channels.

    Kernels are on the left in the order they run, groups on the right, each as a circle whose size grows with its
    number of channels. Beside it are the group's number, as `autogate inspect` lists it, and how many channels, or
    heads, it has. Lines connect a kernel to the groups that it outputs (blue) and reads (orange). If the picture is
    wide, and graphviz (and pydot or pygraphviz) is installed, its layout is used.

    Args:
        channel_map: the model's channels.
        path: path of the file, whose suffix sets the format.
        width: width of the picture in inches.

    Raises:
        AutogateError: matplotlib is not installed, or can't write this format.
    """
    check_drawable(path)
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    graph = channel_map.graph()
    kernels = [node for node in graph if node[0] == "kernel"]
    groups = [node for node in graph if node[0] == "group"]
    height = TOP + ROW * max(4, len(kernels), len(groups))
    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0.0, 0.0, 1.0, 1 - TOP / height))
    axes.set(xlim=(0, 1), ylim=(0, 1))
    axes.set_axis_off()
    places = _layout(graph, kernels, groups, by_graphviz=width >= WIDE)
    for end, colour, words in (("output", "tab:blue", "outputs them"), ("input", "tab:orange", "reads them")):
        edges = [(a, b) for a, b, found in graph.edges(data="end") if found == end]
        nx.draw_networkx_edges(graph, places, edgelist=edges, edge_color=colour, ax=axes, alpha=0.7)
        axes.plot([], [], color=colour, label=words)
    nx.draw_networkx_nodes(graph, places, nodelist=kernels, node_size=12, node_shape="s", node_color="k", ax=axes)
    _draw_groups(axes, graph, places, groups)
    for node in kernels:
        name = shortened(node[1], round(width * LETTERS))
        axes.annotate(name, places[node], (-6, 0), textcoords="offset points", ha="right", va="center", fontsize=7.5)
    figure.legend(loc="upper center", ncols=2, frameon=False, title="channels, and a kernel that", fontsize=8)
    figure.savefig(path)


def _draw_groups(axes: Any, graph: nx.Graph, places: dict[Any, tuple[float, float]], groups: list[Any]) -> None:
    """Circles no higher than a row, with their labels to the right."""
    widest = max((graph.nodes[node]["width"] for node in groups), default=1)
    for node in groups:
        count = graph.nodes[node]["width"]
        across = 4 + (72 * ROW - 5) * (count / widest) ** 0.5  # points
        nx.draw_networkx_nodes(graph, places, [node], node_size=across**2, node_color="tab:gray", linewidths=0, ax=axes)
        beside = (across / 2 + 3, 0)  # points, from the circle's centre
        label = f"{node[1]}: {counted(count, graph.nodes[node]['heads'])}"
        axes.annotate(label, places[node], beside, textcoords="offset points", va="center", fontsize=7.5)


def counted(count: int, heads: bool) -> str:
    """
    >>> counted(64, heads=False), counted(12, heads=True)
    ('64', '12 heads')
    """
    return str(count) if not heads else f"{count} head{'s' if count > 1 else ''}"


def shortened(name: str, most: int) -> str:
    """
    >>> shortened("layer1.0.conv1", 26), shortened("stages.2.blocks.11.attention.projection", 26)
    ('layer1.0.conv1', '…ks.11.attention.projection')
    """
    return name if len(name) <= most else "…" + name[-most:]


def _layout(
    graph: nx.Graph, kernels: list[Any], groups: list[Any], by_graphviz: bool
) -> dict[Any, tuple[float, float]]:
    """Where nodes are, in parts of the picture's width and height; beside them is room for words."""
    found = (_by_graphviz(graph) if by_graphviz and graph else None) or _in_columns(graph, kernels, groups)
    (left, right), (low, high) = (
        ((min(at), max(at)) for at in zip(*found.values(), strict=True)) if found else ((0, 1),) * 2
    )
    return {
        node: (0.38 + 0.44 * (x - left) / ((right - left) or 1), 0.03 + 0.94 * (y - low) / ((high - low) or 1))
        for node, (x, y) in found.items()
    }


def _by_graphviz(graph: nx.Graph) -> dict[Any, tuple[float, float]] | None:
    """Where graphviz places the nodes; None if it isn't installed."""
    for layout in (nx.nx_agraph.graphviz_layout, nx.nx_pydot.graphviz_layout):
        try:
            return layout(graph, prog="dot")  # type: ignore[no-any-return]
        except (ImportError, OSError):
            continue
    return None


def _in_columns(graph: nx.Graph, kernels: list[Any], groups: list[Any]) -> dict[Any, tuple[float, float]]:
    """Kernels in the order they run, and groups in the order of the kernels that they belong to."""
    places = {node: (0.0, -float(index)) for index, node in enumerate(kernels)}
    means = {}
    for node in groups:
        heights = [places[kernel][1] for kernel in graph[node]]
        means[node] = sum(heights) / len(heights) if heights else 0.0
    for rank, node in enumerate(sorted(groups, key=lambda node: -means[node])):
        places[node] = (1.0, -rank * max(1.0, (len(kernels) - 1) / max(1, len(groups) - 1)))
    return places
