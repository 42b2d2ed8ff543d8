"""Seeds of random networks, and what a failing one prints.

`pytest` takes the stored seeds, from 0 on. With `AUTOGATE_DRAWS` it takes that many fresh ones, from `AUTOGATE_SEED`
on, by default a seed of the day (see `tests/conftest.py`).
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from tests.rewriters.random_networks import Recipe, random_recipe

FRESH = "AUTOGATE_DRAWS" in os.environ
"""Whether the networks are other than the stored ones. Then a chunk may lack something by chance."""

FIRST = int(os.environ.get("AUTOGATE_SEED", "0"))
DRAWS = int(os.environ.get("AUTOGATE_DRAWS", "40"))
AT_A_TIME = 20

Check = Callable[[Recipe, float, int], Any]
"""Takes a recipe, the share of live classes and a seed; raises where the network's slim form is wrong."""

TEST = """\
from tests.rewriters.random_networks import Recipe
from {module} import {check}


def test_a_draw_that_failed():
    {check}({recipe!r}, {share}, {seed})
"""


def chunks(count: int) -> list[range]:
    """The first `count` seeds in parts, each a test of its own, so that processes share them."""
    seeds = range(FIRST, FIRST + count)
    return [seeds[start : start + AT_A_TIME] for start in range(0, count, AT_A_TIME)]


def share_for(seed: int) -> float:
    """Share of live classes of a draw: mostly some, now and then next to nothing or nothing at all."""
    return random.Random(seed).choice([0.9, 0.9, 0.6, 0.6, 0.6, 0.2, 0.2, 0.0])


def over_seeds(check: Check, seeds: Sequence[int], drawn: Callable[[int], Recipe] = random_recipe) -> list[Any]:
    """What a check returns for each seed. A failure prints the smallest recipe that fails, as a test."""
    results = []
    for seed in seeds:
        recipe, share = drawn(seed), share_for(seed)
        try:
            results.append(check(recipe, share, seed))
        except Exception as error:
            least = smallest(check, recipe, share, seed)
            raise AssertionError(f"seed {seed}: {error}\n\n{as_test(check, least, share, seed)}") from error
    return results


def as_test(check: Check, recipe: Recipe, share: float, seed: int) -> str:
    """Python source of a test that runs one check on one recipe."""
    return TEST.format(module=check.__module__, check=check.__name__, recipe=recipe, share=share, seed=seed)


def smallest(check: Check, recipe: Recipe, share: float, seed: int) -> Recipe:
    """The recipe made simpler, step by step, while it raises an error of the same class."""
    error = failure(check, recipe, share, seed)
    for simpler in simpler_recipes(recipe):
        if failure(check, simpler, share, seed) is error:
            return smallest(check, simpler, share, seed)
    return recipe


def failure(check: Check, recipe: Recipe, share: float, seed: int) -> type[Exception] | None:
    """The class of what a check raises for a recipe."""
    try:
        check(recipe, share, seed)
    except Exception as error:
        return type(error)
    return None


def simpler_recipes(recipe: Recipe) -> Iterator[Recipe]:
    """Recipes with one block less, a plainer head or a plain chain of blocks."""
    if len(recipe.blocks) > 1:
        for index in range(len(recipe.blocks)):
            yield replace(recipe, blocks=recipe.blocks[:index] + recipe.blocks[index + 1 :])
    head = "linear" if recipe.kind == "features" else "pool"
    if recipe.head != head:
        yield replace(recipe, head=head)
    if recipe.wiring != "chain":
        yield replace(recipe, wiring="chain")
    if recipe.seed:
        yield replace(recipe, seed=0)
