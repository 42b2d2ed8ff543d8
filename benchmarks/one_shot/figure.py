"""A figure of the rows: agreement over the FLOPs left, one panel a network."""

from __future__ import annotations

from pathlib import Path

COLORS = {"l1, global": "tab:blue", "taylor, global": "tab:orange", "fisher, global": "tab:green"}
PEERS = {"torch-pruning L1": "tab:blue", "torch-pruning Taylor": "tab:orange"}


def draw(rows: list[dict], path: Path) -> None:
    """Draw criteria right after closing (dashed) and compensated, and Torch-Pruning's (dotted). Needs matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    networks = list(dict.fromkeys(row["network"] for row in rows))
    figure, axes = plt.subplots(1, len(networks), figsize=(3.6 * len(networks), 3.4), squeeze=False, sharey=True)
    for axis, network in zip(axes[0], networks, strict=True):
        own = [row for row in rows if row["network"] == network]
        for method, color in COLORS.items():
            for form, style in (("compensated", "-"), ("closed", "--")):
                _line(axis, [row for row in own if row["method"] == method], form, style, color, f"{method}, {form}")
        for method, color in PEERS.items():
            _line(axis, [row for row in own if row["method"] == method], "closed", ":", color, method)
        axis.set(title=network, xlabel="share of the FLOPs", ylim=(0, 100))
        axis.invert_xaxis()
        axis.spines[["top", "right"]].set_visible(False)
    axes[0, 0].set_ylabel("% of the dense network's answers")
    labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(*labels, loc="lower center", ncols=3, fontsize=8, frameon=False)
    figure.tight_layout(rect=(0, 0.2, 1, 1))
    figure.savefig(path, metadata={"Date": None})


def _line(axis, rows: list[dict], form: str, style: str, color: str, label: str) -> None:
    points = sorted({row["flops_left"]: row[form] for row in rows}.items())
    if points:
        axis.plot(*zip(*points, strict=True), style, color=color, marker=".", label=label)
