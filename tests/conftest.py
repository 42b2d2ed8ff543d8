"""What makes every run of the tests the same, and a seed for those that draw fresh networks."""

import datetime
import os
import random

import pytest
from hypothesis import settings

# Test processes run side by side: one thread each is the fastest. It is set before torch is imported, and processes
# that tests start inherit it.
os.environ["OMP_NUM_THREADS"] = "1"

settings.register_profile("repeatable", derandomize=True, database=None, deadline=None)
settings.load_profile("repeatable")


def pytest_configure(config: pytest.Config) -> None:
    """Fresh draws start at a seed of the day. It is set before worker processes start: all of them inherit it."""
    if "AUTOGATE_DRAWS" in os.environ:
        os.environ.setdefault("AUTOGATE_SEED", str(datetime.date.today().toordinal() * 100_000))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Random numbers of a test and its fixtures depend on no test before it."""
    # Not above: the process that starts the workers runs no tests, and would import these for nothing.
    import numpy as np
    import torch

    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if "AUTOGATE_DRAWS" in os.environ:
        draws, seed = os.environ["AUTOGATE_DRAWS"], os.environ["AUTOGATE_SEED"]
        terminalreporter.write_line(f"Random networks: AUTOGATE_DRAWS={draws} AUTOGATE_SEED={seed}")
