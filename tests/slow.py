"""Which parameters of a test run by default."""

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def slow_but(quick: Collection[str], names: Iterable[str]) -> list[Any]:
    """Parameters, of which all but the quick ones are marked slow."""
    names = list(names)
    assert set(quick) <= set(names), "a quick one is none of the parameters"
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in names]
