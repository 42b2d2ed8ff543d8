"""The walk through the folders in `rewriters/README.md` prints what it says."""

from __future__ import annotations

import doctest
import re
from pathlib import Path

import rewriters

README = Path(rewriters.__file__).with_name("README.md")


def test_the_walk_through_the_folders_prints_what_it_says():
    text = re.sub(r"^```.*$", "", README.read_text(), flags=re.MULTILINE)
    test = doctest.DocTestParser().get_doctest(text, {}, README.name, str(README), 0)
    failures: list[str] = []
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    result = runner.run(test, out=failures.append)
    assert result.attempted > 30 and not result.failed, "".join(failures)
