"""Draw the channels that each layer keeps, with shared shortcuts and with 1x1 convolutions, one panel per budget.

    python -m benchmarks.cifar10_channels --runs runs/cifar10 --out docs/figures/shortcuts.svg

Reads the results that `benchmarks.cifar10` wrote into a folder. Yang et al., "Non-uniform DNN Structured Subnets
Sampling for Dynamic Inference", figure 6. Needs matplotlib (`pip install -e ".[benchmarks]"`).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

STYLES = {"shared": ("tab:blue", "shared shortcuts"), "conv": ("tab:orange", "1x1 convolutions on shortcuts")}


def runs_in(folder: Path) -> dict[float, dict[str, dict]]:
    """Results by FLOPs target and kind of shortcut."""
    found: dict[float, dict[str, dict]] = {}
    for path in sorted(folder.glob("*.json")):
        result = json.loads(path.read_text())
        if "channels" in result:
            found.setdefault(result["flops_target"], {})[result["shortcuts"]] = result
    return found


def convolutions(result: dict) -> list[tuple[str, int, int]]:
    """(layer, channels left, all channels) of the layers in both kinds of model, without the classifier."""
    return [tuple(layer) for layer in result["channels"][:-1] if "shortcut_conv" not in layer[0]]


def draw(found: dict[float, dict[str, dict]], out: Path) -> None:
    figure, axes = plt.subplots(len(found), 1, figsize=(9, 3.2 * len(found)), squeeze=False, sharex=True)
    for axis, (flops, by_kind) in zip(axes[:, 0], sorted(found.items(), reverse=True), strict=True):
        for place, (kind, result) in enumerate(sorted(by_kind.items(), reverse=True)):
            colour, label = STYLES[kind]
            layers = convolutions(result)
            at = [index + 0.4 * place - 0.2 for index in range(len(layers))]
            label = f"{label}: {result['accuracy_slim']:.2f} %"
            axis.bar(at, [left for _, left, _ in layers], width=0.4, color=colour, label=label)
        axis.step(
            range(len(layers)), [whole for *_, whole in layers], where="mid", color="0.5", linewidth=0.8, label="dense"
        )
        axis.set_title(f"FLOPs left: {flops:.2f}", fontsize=10)
        axis.set_ylabel("output channels")
        axis.legend(fontsize=8, loc="upper left")
        axis.set_xticks(range(len(layers)), [name for name, *_ in layers], rotation=70, fontsize=7, ha="right")
    figure.tight_layout()
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    draw(runs_in(args.runs), args.out)


if __name__ == "__main__":
    main()
