"""The package's README takes a reader through the gates' step: its example runs as it stands."""

import doctest
from pathlib import Path

README = Path(__file__).parents[3] / "autogate" / "gating" / "README.md"


def test_the_example_runs():
    found = doctest.testfile(str(README), module_relative=False, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert found.attempted > 15 and found.failed == 0
