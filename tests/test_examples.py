"""The examples in docstrings run as they stand."""

import doctest
import importlib
import pkgutil

import pytest

import autogate
import rewriters


def modules() -> list[str]:
    return [found.name for package in (autogate, rewriters)
            for found in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")]  # fmt: skip


EXAMPLES = [
    test
    for name in modules()
    for test in doctest.DocTestFinder(exclude_empty=True).find(importlib.import_module(name))
    if test.examples
]


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda test: test.name)
def test_an_example_runs(example):
    assert doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(example).failed == 0


def test_the_verbs_have_examples():
    assert {f"autogate.api.{verb}" for verb in ("prepare", "gates", "step")} <= {test.name for test in EXAMPLES}
