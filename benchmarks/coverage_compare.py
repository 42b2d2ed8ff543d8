"""Coverage of two checkouts, before and after a change: the smallest model of each file, with both in turn.

    git worktree add ../before COMMIT
    python -m benchmarks.coverage_compare run --before ../before --out runs/compare
    python -m benchmarks.coverage_compare table --out runs/compare

`run` starts `benchmarks.coverage` of both checkouts, each for a few models at a time, so that both meet the machine as
busy as it is. What it has measured stays in its folder, and another run continues there. Seconds are processor time.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.coverage_table import Line, exact, only_prepared, table
from benchmarks.model_lists import listed, smallest_of_each_file
from benchmarks.parts import lines

AT_A_TIME = 16
"""Models that one checkout measures before the other's turn: an interpreter takes seconds to start."""

SIDES = ("before", "after")

SECONDS, MEMORY = 60, 8
"""Limits on a model's processor time and memory, in seconds and GiB, if no others are given."""


def run(checkouts: Sequence[Path], names: Sequence[str], out: Path, options: Sequence[str]) -> None:
    """Measure these models with the checkouts before and after; lines of JSON in two files in `out`.

    Raises:
        subprocess.CalledProcessError: the benchmark itself failed in one of the checkouts.
    """
    both = list(zip(SIDES, checkouts, strict=True))
    for start in range(0, len(names), AT_A_TIME):
        some, both = names[start : start + AT_A_TIME], both[::-1]
        for side, checkout in both:
            if {line["model"] for line in lines(out / f"{side}.jsonl")} >= set(some):
                continue
            command = [sys.executable, "-m", "benchmarks.coverage", "--models", *some, *options]
            command += ["--out", str((out / f"{side}.jsonl").absolute())]
            subprocess.run(command, cwd=checkout, env=os.environ | {"PYTHONPATH": str(checkout)}, check=True)


def document(before: Iterable[Line], after: Iterable[Line]) -> str:
    """The tables: both checkouts in total, and each model that both have measured."""
    earlier = {line["model"]: line for line in before}
    pairs = [(earlier[line["model"]], line) for line in after if line["model"] in earlier]
    return _totals(pairs) + "\n" + table(_HEADER, map(_row, sorted(pairs, key=lambda pair: pair[1]["family"])))


_HEADER = ("family", "model", "exact", "reach", "left", "prepare", "times before")


def _row(pair: tuple[Line, Line]) -> tuple[Any, ...]:
    prepared = [line["prepare_s"] for line in pair]
    times = f"{prepared[1] / prepared[0]:.2f}" if all(prepared) else "-"
    return (
        pair[1]["family"],
        pair[1]["model"],
        _told(pair, _verdict),
        _told(pair, lambda line: _number(line["reach"], "{:.1%}")),
        _told(pair, lambda line: _number(line["left"], "{:.3f}")),
        ", ".join(_number(seconds, "{:.1f}") for seconds in prepared),
        times,
    )


def _told(pair: tuple[Line, Line], of: Callable[[Line], str]) -> str:
    """What both have, once if it is the same."""
    return ", ".join(dict.fromkeys(map(of, pair)))


def _verdict(line: Line) -> str:
    if exact(line):
        return "yes"
    return f"no: {line['step']}" if line["step"] or only_prepared(line) else "no"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def _totals(pairs: list[tuple[Line, Line]]) -> str:
    reached = [pair for pair in pairs if all(line["reach"] is not None for line in pair)]
    ratios = [new["prepare_s"] / old["prepare_s"] for old, new in reached]
    sides = list(zip(*reached, strict=True))
    rows = [
        ("models", len(pairs), len(pairs)),
        ("exact", *(sum(map(exact, side)) for side in zip(*pairs, strict=True))),
        ("prepared by both", len(reached), len(reached)),
        ("reach, mean of these", *(f"{sum(line['reach'] for line in side) / len(side):.2%}" for side in sides)),
        ("FLOPs left with half of the classes dead, median", *(_median(side, "left", "{:.3f}") for side in sides)),
        ("seconds that prepare takes, median", *(_median(side, "prepare_s", "{:.2f}") for side in sides)),
        ("of these, times before: median, most", "", f"{median(ratios):.2f}, {max(ratios):.2f}"),
    ]
    return table(("", *SIDES), rows)


def _median(side: Iterable[Line], key: str, form: str) -> str:
    return form.format(median(line[key] for line in side))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["run", "table"])
    parser.add_argument("--before", type=Path, help="the checkout before the change; after it is this one")
    parser.add_argument("--out", type=Path, default=Path("runs/compare"), help="folder of the results")
    parser.add_argument("--size", type=int, default=128, help="side of the images, for models that take any size")
    parser.add_argument("--most", type=float, default=100, help="limit on a model's parameters, in millions")
    parser.add_argument("--timeout", type=int, default=SECONDS)
    parser.add_argument("--memory", type=float, default=MEMORY)
    args = parser.parse_args()
    if args.action == "table":
        print(document(*(lines(args.out / f"{side}.jsonl") for side in SIDES)))
        return
    options = ["--size", str(args.size), "--timeout", str(args.timeout), "--memory", str(args.memory)]
    models = smallest_of_each_file(listed(args.size), args.out / "parameters.json", most=args.most * 1e6)
    run([args.before.absolute(), Path.cwd()], [one.name for one in models], args.out, options)


if __name__ == "__main__":
    main()
