"""Hugging Face's models, tiny from their configurations: reach, exactness and generated tokens.

    python -m benchmarks.huggingface --out runs/huggingface.jsonl [MODEL ...]

Each model runs in a process of its own; models that are already in the output file are skipped. Prints a table of all
that the file has.
"""

from __future__ import annotations

import argparse
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.huggingface.measure import measured, on_one_thread
from benchmarks.huggingface.models import MODELS
from benchmarks.parts import lines, measure_missing

_PROCESSES = multiprocessing.get_context("forkserver")
_PROCESSES.set_forkserver_preload(["benchmarks.huggingface.measure"])  # imports take seconds


def _apart(name: str) -> dict[str, Any]:
    """Figures of a model, or its error, from a process of its own."""
    try:
        with ProcessPoolExecutor(1, mp_context=_PROCESSES, initializer=on_one_thread) as pool:
            return pool.submit(measured, name).result()
    except Exception as error:  # what any model may raise; the table says so
        return {"error": f"{type(error).__name__}: {error}"}


def row(line: dict[str, Any]) -> str:
    """A row of the table, with the error in place of figures where there is one."""
    if "error" in line:
        return f"| {line['model']} | {line['error'][:120]} | | |"
    tokens = {True: "same", False: "others", None: "-"}[line["same_tokens"]]
    return f"| {line['model']} | {line['reach']:.0%} | {line['largest_error']:.0e} | {tokens} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=list(MODELS), help=", ".join(MODELS))
    parser.add_argument("--out", type=Path, default=Path("runs/huggingface.jsonl"))
    args = parser.parse_args()
    measure_missing(args.out, args.models, _apart)
    print("| model | reach | largest error | generated tokens |\n|---|---|---|---|")
    found = {line["model"]: line for line in lines(args.out)}
    for name in (name for name in MODELS if name in found):
        print(row(found[name]))


if __name__ == "__main__":
    main()
