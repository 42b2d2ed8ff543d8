"""A run that tests only read."""

from __future__ import annotations

from pathlib import Path

import pytest

from autogate.training import RunFolder, start
from tests.autogate.training.runs import Diary, recipe


@pytest.fixture(scope="session")
def plain(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[RunFolder, Diary]:
    """A run that was never stopped."""
    folder, diary = tmp_path_factory.mktemp("runs") / "plain", Diary()
    assert start(recipe(pictures), folder, callbacks=[diary]) is not None
    return RunFolder(folder), diary
