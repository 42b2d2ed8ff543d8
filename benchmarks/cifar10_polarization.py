"""Draw how gates polarise during a run: their histogram, the FLOPs left, and accuracy before and after finalize.

    python -m benchmarks.cifar10_polarization --run runs/cifar10/shared_0.5_0.json --out docs/figures/polarization.svg

Reads one run that `benchmarks.cifar10` wrote. Guo et al., "GDP", figures 9 (gates), 10 (the gated network's accuracy
predicts the slim one's) and 11 (stability). Needs matplotlib (`pip install -e ".[benchmarks]"`).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import LogNorm


def draw(result: dict, out: Path) -> None:
    curve = result["curve"]
    epochs = [point["epoch"] for point in curve]
    gates = np.array([point["gates"] for point in curve], dtype=float)
    figure, (histogram, left, correct) = plt.subplots(3, 1, figsize=(8, 8), sharex=True)

    edges = [epochs[0] - 0.5, *(epoch + 0.5 for epoch in epochs)]
    shown = histogram.pcolormesh(
        edges, np.linspace(0, 1, gates.shape[1] + 1), (gates / gates.sum(1, keepdims=True)).T,
        norm=LogNorm(1e-3, 1), cmap="Blues",
    )  # fmt: skip
    histogram.set_ylabel("gate")
    figure.colorbar(shown, ax=[histogram, left, correct], label="part of the gates", shrink=0.3, anchor=(0, 1))

    left.plot(epochs, [point["flops_left"] for point in curve], marker="o", markersize=3)
    left.axhline(result["flops_target"], color="0.5", linewidth=0.8)
    left.set_ylabel("FLOPs left")

    correct.plot(epochs, [point["accuracy_gated"] for point in curve], linewidth=4, alpha=0.4, label="gated")
    correct.plot(epochs, [point["accuracy_slim"] for point in curve], linewidth=1, color="k", label="finalized")
    correct.set_ylabel("test accuracy, %")
    correct.set_xlabel("epoch")
    correct.legend(fontsize=8)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, bbox_inches="tight")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    draw(json.loads(args.run.read_text()), args.out)


if __name__ == "__main__":
    main()
