"""Tables and a figure of several widths in one network, over the rows of all blocks."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.accuracy.blocks import rows_in
from benchmarks.accuracy.table import standard_error

SHARES = (0.05, 0.22, 0.45)
"""Of the FLOPs, of the subnets that are found."""

UNIFORM, FULL = "uniform", "full"
STRUCTURES = ("clipped Lasso", UNIFORM, "group Lasso")
RULES = ("together", "sandwich")


class Cell(NamedTuple):
    """One subnet of structures that were trained in one way, over all blocks."""

    flops_left: float
    scores: dict[str, float]
    """By block."""

    def ahead(self, of: Cell) -> str:
        """The mean over blocks of the differences within one, with its standard error."""
        differences = [score - of.scores[block] for block, score in self.scores.items() if block in of.scores]
        if not differences:
            return ""
        error = standard_error(differences)
        return f"{statistics.mean(differences):+.2f}" + ("" if error is None else f" ± {error:.2f}")


def cells(rows: Iterable[dict[str, Any]]) -> dict[tuple[str, str, str], Cell]:
    """By structures, training and subnet."""
    found: dict[tuple[str, str, str], Cell] = {}
    for row in rows:
        if row["subnet"] is not None:
            place = (row["structures"], row["training"], row["subnet"])
            cell = found.setdefault(place, Cell(row["flops_left"], {}))
            cell.scores[row["block"]] = row["score"]
    full = found.get((UNIFORM, "alone", FULL))
    if full is not None:
        found.update({(structures, "alone", FULL): full for structures in STRUCTURES})
    return found


def alike(rows: Iterable[dict[str, Any]]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Rows that may be compared, with what they have in common in words."""
    by_title: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        title = (
            f"{row['dense_epochs']} + {row['epochs']} epochs of {row['samples']:,} images, "
            f"batches of {row['batch']}, peak rate {row['peak']:g}, tested on {row['test_samples']:,}"
        )
        by_title.setdefault(title, []).append(row)
    yield from by_title.items()


def table(path: Path) -> None:
    """Print a table for each way to train: scores, and how far they are ahead."""
    for title, rows in alike(rows_in(path)):
        blocks = {row["block"]: row["dense_score"] for row in rows}
        print(f"\n{title}; {len(blocks)} blocks, dense {statistics.mean(blocks.values()):.2f} %\n")
        print("| structures | subnet | FLOPs | alone | together | over alone | sandwich | over alone | over uniform |")
        print("|---|---|---|---|---|---|---|---|---|")
        found = cells(rows)
        for structures in STRUCTURES:
            for name in (*(f"{share:g}" for share in SHARES), FULL):
                own = {training: found.get((structures, training, name)) for training in ("alone", *RULES)}
                print(f"| {' | '.join(_row(structures, name, own, found.get((UNIFORM, 'sandwich', name))))} |")


def _row(structures: str, name: str, own: dict[str, Cell | None], uniform: Cell | None) -> Sequence[str]:
    def score(cell: Cell | None) -> str:
        return "" if cell is None else f"{statistics.mean(cell.scores.values()):.2f}"

    def ahead(cell: Cell | None, of: Cell | None) -> str:
        return "" if cell is None or of is None else cell.ahead(of)

    one = next((cell for cell in own.values() if cell is not None), None)
    share = "" if one is None else f"{one.flops_left:.3f}"
    beside = "" if structures == UNIFORM else ahead(own["sandwich"], uniform)
    columns = (text for rule in RULES for text in (score(own[rule]), ahead(own[rule], own["alone"])))
    return [structures, name, share, score(own["alone"]), *columns, beside]


def figure(path: Path, out: Path) -> None:
    """Draw accuracy against FLOPs, of all widths of one network (figure 9) and of networks of their own."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    drawn, axis = plt.subplots(figsize=(7, 4.2))
    for structures, training in itertools.product(STRUCTURES, ("sandwich", "alone")):
        points: dict[str, list[tuple[float, float]]] = {}
        for row in rows_in(path):
            if (row["structures"], row["training"]) == (structures, training):
                points.setdefault(row["block"], []).append((row["flops_left"], row["score"]))
        color, style = f"C{STRUCTURES.index(structures)}", ".-" if training == "sandwich" else "x"
        label = f"{structures}, {'one network' if training == 'sandwich' else 'alone'}"
        for number, of_block in enumerate(points.values()):
            axis.plot(*zip(*sorted(of_block), strict=True), style, color=color, label=None if number else label)
    axis.set_xlabel("share of the FLOPs")
    axis.set_ylabel("accuracy (%)")
    axis.legend(fontsize=8)
    drawn.tight_layout()
    drawn.savefig(out)
