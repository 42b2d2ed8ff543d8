"""Write the page and the figures about the rows of all blocks."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.accuracy.blocks import rows_in

PAGE = """# Accuracy at equal FLOPs and equal epochs

    python -m benchmarks.accuracy run --setting SETTING --data FOLDER --block SEED
    python -m benchmarks.accuracy table

A block is one dense network, with every method from it: the same epochs, samples, augmentation, optimizer and seed, on
one machine. "dense" trains on for as many epochs, unslimmed. Scores are means over blocks with their standard errors.
How far autogate is ahead is the mean over blocks of the differences within one, so blocks of several machines count
together. The rows are in `docs/benchmarks/data/accuracy`.

{tables}
"""


@dataclass(frozen=True)
class Row:
    """The runs of one method in one setting at one share of the FLOPs."""

    method: str
    flops_target: float
    by_block: Mapping[str, float]
    flops_left: float
    params_left: float

    @property
    def mean(self) -> float:
        return statistics.mean(self.by_block.values())

    @property
    def error(self) -> float | None:
        """Standard error of the mean; None for a single block."""
        return standard_error(list(self.by_block.values()))


def standard_error(values: Sequence[float]) -> float | None:
    """Standard error of the mean; None for a single value."""
    return statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None


def ahead(row: Row, of: Row) -> list[float]:
    """Difference between the scores of two rows, for each block that has both."""
    return [row.by_block[block] - of.by_block[block] for block in sorted(row.by_block.keys() & of.by_block.keys())]


def titles(found: Iterable[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Rows that may be compared, by what they have in common in words. Trials of settings are left out."""
    by_title: dict[str, list[dict[str, Any]]] = {}
    for row in found:
        if not row["set"]:
            title = (
                f"{row['setting']}, {row['dense_epochs']} + {row['epochs']} epochs, {row['samples']:,} samples, "
                f"tested on {row['test_samples']:,}"
            )
            by_title.setdefault(title, []).append(row)
    return by_title


def rows(found: Iterable[dict[str, Any]]) -> list[Row]:
    """Sorted by share, largest first, then by score, best first."""
    by_case: dict[tuple[str, float], list[dict[str, Any]]] = {}
    for result in found:
        by_case.setdefault((result["method"], result["flops_target"]), []).append(result)
    made = [
        Row(
            method, target, {result["block"]: result["score"] for result in cases},
            statistics.mean(result["flops_left"] for result in cases),
            statistics.mean(result["params_left"] for result in cases),
        )
        for (method, target), cases in by_case.items()
    ]  # fmt: skip
    return sorted(made, key=lambda row: (-row.flops_target, -row.mean))


def table(title: str, found: Sequence[dict[str, Any]]) -> str:
    """The table in Markdown, with the blocks and processors behind it."""
    of, unit = rows(found), found[0]["unit"]
    processors = sorted({row["processor"] for row in found})
    dense = {row["block"]: row["dense_score"] for row in found}
    lines = [
        f"## {title}\n",
        f"{len(dense)} blocks, on {'; '.join(processors)}. The networks that all methods start from have "
        f"{_with_error(statistics.mean(dense.values()), standard_error(list(dense.values())))}.\n",
        f"| FLOPs asked | method | FLOPs left | parameters left | {unit} | by block | autogate ahead by |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in of:
        by_block = ", ".join(f"{score:.2f}" for _, score in sorted(row.by_block.items()))
        lines.append(
            f"| {row.flops_target:g} | {row.method} | {row.flops_left:.3f} | {row.params_left:.3f} "
            f"| {_with_error(row.mean, row.error)} | {by_block} | {_leads(row, of)} |"
        )
    return "\n".join(lines)


def _with_error(mean: float, error: float | None, form: str = ".2f") -> str:
    return f"{mean:{form}}" if error is None else f"{mean:{form}} ± {error:.2f}"


def _leads(row: Row, of: Sequence[Row]) -> str:
    """How far autogate is ahead of each method at the same share, and of dense training at each share."""
    found = []
    for own in of:
        dense = row.method == "dense"
        if own.method == "autogate" != row.method and (dense or own.flops_target == row.flops_target):
            lead = ahead(own, row)
            if lead:
                told = _with_error(statistics.mean(lead), standard_error(lead), "+.2f")
                found.append(f"{told} at {own.flops_target:g}" if dense else told)
    return ", ".join(found)


def draw(title: str, unit: str, of: Sequence[Row], path: Path) -> None:
    """Draw scores against the FLOPs left."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 4.2))
    for method in dict.fromkeys(row.method for row in of):
        points = [row for row in of if row.method == method]
        errors = [row.error or 0.0 for row in points]
        if method == "dense":
            axis.axhline(points[0].mean, color="grey", linestyle="--", label="dense, same epochs")
            continue
        lefts, means = [row.flops_left for row in points], [row.mean for row in points]
        axis.errorbar(lefts, means, errors, marker="o", capsize=3, label=method)
    axis.set_title(title)
    axis.set_xlabel("FLOPs left")
    axis.set_ylabel(unit)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


def write(folder: Path, docs: Path) -> None:
    """Write accuracy.md into `docs` and a figure for each of its tables into `docs/figures`."""
    found = titles(rows_in(folder))
    if not found:
        raise SystemExit(f"{folder} has no rows.")
    (docs / "figures").mkdir(parents=True, exist_ok=True)
    parts = []
    for title, own in found.items():
        name = "accuracy_" + "_".join(title.replace(",", "").replace("+", "").split()[:3]) + ".svg"
        draw(title, own[0]["unit"], rows(own), docs / "figures" / name)
        parts.append(f"{table(title, own)}\n\n![{title}: scores against the FLOPs left](figures/{name})")
    (docs / "accuracy.md").write_text(PAGE.format(tables="\n\n".join(parts)))
