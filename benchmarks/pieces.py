"""Many draws, counted in pieces: outcomes are noted in a file as they come, and a later start goes on from there."""

from __future__ import annotations

import collections
import json
import random
from collections.abc import Callable
from pathlib import Path


def counted(
    what: str, draws: int, seed: int, once: Callable[[random.Random], str], notes: Path | None = None
) -> collections.Counter[str]:
    """How often each outcome came in so many draws.

    Args:
        what: is drawn; the file may have notes of other things too.
        draws: their number, those that were noted before included.
        seed: each draw has random numbers of its own, from the seed and its number.
        once: makes one draw and says how it ended.
        notes: a file with one line for each draw; nothing is noted if None.
    """
    found: dict[int, str] = {}
    if notes is not None and notes.exists():
        for line in notes.read_text().splitlines():
            one = json.loads(line)
            if (one["what"], one["seed"]) == (what, seed):
                found[one["draw"]] = one["outcome"]
    for number in range(draws):
        if number not in found:
            found[number] = once(random.Random(f"{seed} {number}"))
            if notes is not None:
                with notes.open("a") as file:
                    print(json.dumps({"what": what, "seed": seed, "draw": number, "outcome": found[number]}), file=file)
    return collections.Counter(outcome for number, outcome in found.items() if number < draws)
