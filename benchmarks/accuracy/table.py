"""Write the page and the figure about the results of all runs."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

PAGE = """# Accuracy at equal FLOPs and equal epochs

    python -m benchmarks.accuracy run --data FOLDER --out runs/accuracy

On CIFAR-10. Every method starts from the same trained networks and spends the same epochs, images, augmentation,
optimizer and seeds. Means over seeds, with their standard errors. "dense" trains on for as many epochs, unslimmed. How
far autogate is ahead is the mean over pairs that start from the same network, which the seeds of one method differ by.

{tables}
"""


class Row(NamedTuple):
    """The runs of one method on one model at one target."""

    method: str
    flops_target: float
    by_seed: Mapping[int, float]
    flops_left: float
    params_left: float

    @property
    def mean(self) -> float:
        return statistics.mean(self.by_seed.values())

    @property
    def error(self) -> float | None:
        """Standard error of the mean; None for a single seed."""
        return standard_error(list(self.by_seed.values()))


def standard_error(values: Sequence[float]) -> float | None:
    """Standard error of the mean; None for a single value."""
    return statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None


def ahead(row: Row, of: Row) -> list[float]:
    """Difference between the accuracies of two rows, for each network that both start from."""
    return [row.by_seed[seed] - of.by_seed[seed] for seed in sorted(row.by_seed.keys() & of.by_seed.keys())]


def results(folder: Path) -> list[dict]:
    """The results in the folder's JSON files, without the dense networks and trials of settings."""
    found = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    return [result for result in found if "method" in result and not result["set"]]


def rows(found: Iterable[dict]) -> list[Row]:
    """Sorted by target, largest first, then by accuracy, best first."""
    by_case: dict[tuple[str, float], list[dict]] = {}
    for result in found:
        by_case.setdefault((result["method"], result["flops_target"]), []).append(result)
    made = [
        Row(
            method, target, {result["seed"]: result["accuracy"] for result in cases},
            statistics.mean(result["flops_left"] for result in cases),
            statistics.mean(result["params_left"] for result in cases),
        )
        for (method, target), cases in by_case.items()
    ]  # fmt: skip
    return sorted(made, key=lambda row: (-row.flops_target, -row.mean))


def table(title: str, of: Sequence[Row]) -> str:
    """The table in Markdown."""
    lines = [
        f"## {title}\n",
        "| FLOPs asked | method | FLOPs left | parameters left | accuracy (%) | by seed | autogate ahead by |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in of:
        by_seed = ", ".join(f"{accuracy:.2f}" for _, accuracy in sorted(row.by_seed.items()))
        lines.append(
            f"| {row.flops_target:g} | {row.method} | {row.flops_left:.3f} | {row.params_left:.3f} "
            f"| {_with_error(row.mean, row.error)} | {by_seed} | {_leads(row, of)} |"
        )
    return "\n".join(lines)


def _with_error(mean: float, error: float | None, form: str = ".2f") -> str:
    return f"{mean:{form}}" if error is None else f"{mean:{form}} ± {error:.2f}"


def _leads(row: Row, of: Sequence[Row]) -> str:
    """How far autogate is ahead of each method at the same target, and of dense training at each target."""
    found = []
    for own in of:
        dense = row.method == "dense"
        if own.method == "autogate" != row.method and (dense or own.flops_target == row.flops_target):
            lead = ahead(own, row)
            if lead:
                told = _with_error(statistics.mean(lead), standard_error(lead), "+.2f")
                found.append(f"{told} at {own.flops_target:g}" if dense else told)
    return ", ".join(found)


def draw(by_model: dict[str, list[Row]], path: Path) -> None:
    """Draw accuracy against the FLOPs left, one panel per model."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(by_model), figsize=(6 * len(by_model), 4.2), squeeze=False)
    for axis, (model, of) in zip(axes[0], by_model.items(), strict=True):
        for method in dict.fromkeys(row.method for row in of):
            points = [row for row in of if row.method == method]
            errors = [row.error or 0.0 for row in points]
            if method == "dense":
                axis.axhline(points[0].mean, color="grey", linestyle="--", label="dense, same epochs")
                continue
            lefts, means = [row.flops_left for row in points], [row.mean for row in points]
            axis.errorbar(lefts, means, errors, marker="o", capsize=3, label=method)
        axis.set_title(model)
        axis.set_xlabel("FLOPs left")
        axis.grid(alpha=0.3)
        axis.legend()
    axes[0][0].set_ylabel("test accuracy (%)")
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


def write(runs: Path, docs: Path) -> None:
    """Write accuracy.md and accuracy.svg into `docs`."""
    found = results(runs)
    if not found:
        raise SystemExit(f"{runs} has no results.")
    by_model = {
        model: rows(result for result in found if result["model"] == model)
        for model in dict.fromkeys(result["model"] for result in found)
    }
    docs.mkdir(parents=True, exist_ok=True)
    draw(by_model, docs / "accuracy.svg")
    tables = []
    for model, of in by_model.items():
        epochs = sorted({result["epochs"] for result in found if result["model"] == model})
        tables.append(table(f"{model}, {' and '.join(map(str, epochs))} epochs", of))
    tables.append("![Accuracy against FLOPs left](accuracy.svg)")
    (docs / "accuracy.md").write_text(PAGE.format(tables="\n\n".join(tables)))
