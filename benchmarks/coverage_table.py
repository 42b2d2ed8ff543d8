"""docs/coverage.md from the lines that `benchmarks/coverage.py` measured.

python -m benchmarks.coverage_table runs/coverage.jsonl runs/peer.jsonl --out docs/coverage.md
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.coverage import PEER_SECONDS, TURNS
from benchmarks.coverage_model import DOUBLE, SINGLE
from benchmarks.parts import LEAST_SPREAD, lines

WANTED = 0.9
"""Models whose gates reach a smaller share of the FLOPs are listed, with what pins the rest."""

MEMORY = 1.5
"""Limit on the peak memory of prepare, relative to model and captured graph."""

Line = dict[str, Any]

HEADER = """# Coverage

Written by these commands:

{commands}

## How it was measured

Models are timm's and torchvision's; of torchvision's detectors backbone, neck and heads. With `--size` images are
smaller, where a model takes any size. Each model runs in a process of its own, with random weights:

1. It is prepared.
2. A random half of its classes is killed.
3. Batch norms are given the statistics of a batch. Variances are raised where a small change of the inputs would come
   out a thousand times as large.
4. It is finalized.

If several files have a model, the last one counts. A file of `--method prepare` reports on `prepare` alone.

| Column | Meaning |
| --- | --- |
| *exact* | models whose outputs differ by at most 1e-5 of their size in float32 or, where the rounding of float32 is larger than that, by at most 1e-10 in float64 |
| *reach* | the share of FLOPs (multiply-adds with kernels) in layers with a gate on their inputs or outputs; the smallest of the family |
| *left* | the share of FLOPs left with half of the classes dead; the median |
| *prepare*, *finalize* | seconds of processor time on one thread; medians |
| *memory* | the peak of what `prepare` took, over the bytes of the model's tensors plus those that the process grew by when it captured the graph. Pages of libraries' code, and what a process does only once, are in neither |

## In total
"""  # noqa: E501  (a row of a Markdown table is one line)


def joined(found: Iterable[Line]) -> list[Line]:
    """One line per model, joined from both methods' files; none for models that autogate hasn't been run on."""
    by_model: dict[str, Line] = {}
    for line in found:
        known = by_model.setdefault(line["model"], {})
        kept = known.keys() if only_prepared(line) else ()
        known.update({key: value for key, value in line.items() if value is not None or key not in kept})
    return [line for line in by_model.values() if "family" in line]


def only_prepared(line: Line) -> bool:
    """Whether a model was only prepared: the rest may be in an earlier line."""
    return line.get("step") == "" and line["difference"] is None


def exact(line: Line) -> bool:
    """Whether gated and slim outputs are the same up to rounding."""
    if line["step"] or only_prepared(line):
        return False
    double = line["double_difference"]
    return line["difference"] <= SINGLE or (double is not None and double <= DOUBLE)


def _blind(line: Line) -> bool:
    """Whether it is exact, but would be so if it were wrong, because outputs hardly depend on inputs."""
    return exact(line) and not line["spread"] > LEAST_SPREAD


def nothing_to_prune(line: Line) -> bool:
    return "none of its channels can be removed" in line["error"]


def memory_taken(line: Line) -> float:
    """Peak memory of prepare, relative to model and captured graph."""
    return line["prepare_bytes"] / (line["model_bytes"] + line["graph_bytes"])


def document(results: list[Line], options: Iterable[str], files: Iterable[Path]) -> str:
    """The whole page, for what was measured with these options and is in these files."""
    commands = [f"    python -m benchmarks.coverage {one}" for one in options]
    commands.append(f"    python -m benchmarks.coverage_table {' '.join(map(str, files))} --out docs/coverage.md")
    tried = [line for line in results if line["step"] != "memory"]
    parts = [
        HEADER.replace("{commands}", "\n".join(commands)),
        _totals(tried),
        _by_family(tried),
        _failures(tried),
        _low(tried),
        _shallow(tried),
    ]
    if any(line.get("peer") for line in tried):
        parts.append(_peers(tried))
    return "\n".join(part for part in parts if part)


def _totals(tried: list[Line]) -> str:
    done = [line for line in tried if line["reach"] is not None]
    rows = [
        ("models tried", len(tried)),
        ("families (files) they are from", len({line["family"] for line in tried})),
        ("exact", sum(map(exact, tried))),
        (
            f"of these, outputs of two samples differ by less than {LEAST_SPREAD:g} of their size",
            sum(map(_blind, tried)),
        ),
        ("nothing to prune", sum(map(nothing_to_prune, tried))),
        (f"reach of at least {WANTED:.0%}", sum(line["reach"] >= WANTED for line in done)),
        ("FLOPs left with half of the classes dead, median", f"{median(line['left'] for line in done):.3f}"),
        ("seconds that prepare takes: median, most", _median_and_most(line["prepare_s"] for line in done)),
        (
            f"memory above {MEMORY} times model and graph",
            sum(memory_taken(line) > MEMORY for line in done if line["graph_bytes"] is not None),
        ),
    ]
    return table(("", ""), rows)


def _median_and_most(values: Iterable[float]) -> str:
    found = list(values)
    return f"{median(found):.1f}, {max(found):.1f}"


def _by_family(tried: list[Line]) -> str:
    families: dict[str, list[Line]] = defaultdict(list)
    for line in tried:
        families[line["family"]].append(line)
    header = ("family", "models", "exact", "reach", "left", "prepare", "finalize", "memory")
    return "## By family\n\n" + table(header, [_family(name, own) for name, own in sorted(families.items())])


def _family(name: str, own: list[Line]) -> tuple[Any, ...]:
    def over(key: str, of: Any, form: str) -> str:
        values = [line[key] for line in own if line[key] is not None]
        return form.format(of(values)) if values else "-"

    memory = [memory_taken(line) for line in own if line["graph_bytes"] is not None]
    return (
        name, len(own), sum(map(exact, own)), over("reach", min, "{:.1%}"), over("left", median, "{:.3f}"),
        over("prepare_s", median, "{:.1f}"), over("finalize_s", median, "{:.1f}"),
        f"{max(memory):.1f}" if memory else "-",
    )  # fmt: skip


def _failures(tried: list[Line]) -> str:
    failed = [line for line in tried if not exact(line) and not only_prepared(line)]
    if not failed:
        return ""
    rows = [(line["model"], line["step"] or "inexact", _why(line)) for line in failed]
    return "## Not done, or not exact\n\n" + table(("model", "at", "why"), rows)


def _why(line: Line) -> str:
    if line["step"] == "float64":
        return f"differs by {line['difference']:.1e}; in float64 the model itself doesn't run"
    if line["error"]:
        return " ".join(line["error"].split())[:200].replace("|", "/")
    double = line["double_difference"]
    return f"differs by {line['difference']:.1e}" + (f", {double:.1e} in float64" if double is not None else "")


def _low(tried: list[Line]) -> str:
    low = [line for line in tried if line["reach"] is not None and line["reach"] < WANTED]
    if not low:
        return ""
    rows = []
    for line in sorted(low, key=lambda line: line["reach"]):
        reasons = ", ".join(f"{place} ({share:.1%})" for place, share in list(line["pinned"].items())[:3])
        rows.append((line["model"], f"{line['reach']:.1%}", reasons))
    title = f"## Reach below {WANTED:.0%}\n\n"
    text = "Each reason is followed by the share of FLOPs that it keeps out of reach. Shares overlap.\n\n"
    return title + text + table(("model", "reach", "why"), rows)


def _shallow(tried: list[Line]) -> str:
    fewer = [(line["model"], {key: value for key, value in line["arguments"].items() if key != "img_size"})
             for line in tried]  # fmt: skip
    rows = [(model, arguments) for model, arguments in fewer if arguments]
    if not rows:
        return ""
    return "## With fewer blocks\n\nThese models don't fit in 20 GiB as a whole.\n\n" + table(
        ("model", "built with"), rows
    )


def _peers(tried: list[Line]) -> str:
    both = [line for line in tried if line.get("peer")]
    theirs = [line for line in both if not line["peer"]["error"]]
    timed = [line for line in theirs if line["peer"]["prepare_s"] is not None]
    rows = [
        ("models", len(both), len(both)),
        ("slim model runs", sum(line["step"] == "" for line in both), len(theirs)),
        (
            "FLOPs left, median where both run",
            f"{median(line['left'] for line in timed):.3f}",
            f"{median(line['peer']['left'] for line in timed):.3f}",
        ),
        (
            "seconds, median where both run",
            f"{median(line['peer']['prepare_s'] for line in timed):.2f}",
            f"{median(line['peer']['seconds'] for line in timed):.2f}",
        ),
        (
            "faster, of those where both run",
            sum(line["peer"]["prepare_s"] <= line["peer"]["seconds"] for line in timed),
            sum(line["peer"]["prepare_s"] > line["peer"]["seconds"] for line in timed),
        ),
    ]
    text = (
        "## Torch-Pruning\n\nThe general part of its timm example: `MetaPruner` with importance by magnitude, half of "
        "all channels, the classifier ignored.\nIts seconds are those of graph and pruner's step, autogate's those of "
        f"`prepare`, in the same process: of {TURNS} turns each the least.\nA model may take {PEER_SECONDS} s of both, "
        "building it included.\n\n"
    )
    return text + table(("", "autogate", "Torch-Pruning"), rows)


def table(header: Iterable[Any], rows: Iterable[Iterable[Any]]) -> str:
    def row(cells: Iterable[Any]) -> str:
        return "| " + " | ".join(map(str, cells)) + " |"

    header = tuple(header)
    return "\n".join([row(header), row("---" for _ in header), *map(row, rows)]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+", help="files of results, of both methods")
    parser.add_argument("--out", type=Path, default=Path("docs/coverage.md"))
    parser.add_argument(
        "--options", nargs="+", default=["--out runs/coverage.jsonl"], help="options of each run, in one string"
    )
    parser.add_argument("--more", type=Path, nargs="*", default=[], help="files of text to append")
    args = parser.parse_args()
    text = document(joined(line for path in args.results for line in lines(path)), args.options, args.results)
    args.out.write_text("\n".join([text, *(path.read_text() for path in args.more)]))


if __name__ == "__main__":
    main()
