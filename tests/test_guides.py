"""The code on the pages of docs/ and the programs in examples/ run as they stand."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState

ROOT = Path(__file__).parent.parent


def blocks(text: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)


def sections(page: str) -> Iterator[Any]:
    """The code of each section of a page, behind that of the page's beginning."""
    beginning, *rest = re.split(r"^## (.*)\n", (ROOT / "docs" / page).read_text(), flags=re.MULTILINE)
    for title, text in zip(rest[::2], rest[1::2], strict=True):
        if blocks(text):
            place = f"docs/{page}, {title}"
            yield pytest.param(place, [*blocks(beginning), *blocks(text)], id=place)


@pytest.fixture
def alone(tmp_path, monkeypatch):
    """An empty folder, and a process that is a world of its own."""
    monkeypatch.chdir(tmp_path)
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}.items():
        monkeypatch.setenv(name, value)
    torch.manual_seed(0)
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    torch._dynamo.reset()
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("place", "codes"), [*sections("training-loops.md"), *sections("budgets.md")])
def test_the_code_of_a_section_runs(place, codes, alone):
    names = {"__name__": "page"}
    for code in codes:
        exec(compile(code, place, "exec"), names)
    if "slim" in names:
        assert sum(p.numel() for p in names["slim"].parameters()) < sum(
            p.numel() for p in names["network"]().parameters()
        )


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_the_distributed_example_runs(strategy, tmp_path):
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
        "examples/distributed.py", "--strategy", strategy, "--epochs", "1", "--batch", "96",
        "--save", str(tmp_path / "slim.pt"),
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = re.search(rf"{strategy}: accuracy ([\d.]+) % gated, ([\d.]+) % slim", done.stdout)
    assert found and found[1] == found[2], done.stdout
    slim = torch.load(tmp_path / "slim.pt", weights_only=False)
    assert type(slim.fc) is torch.nn.Linear and not hasattr(slim, "autogate")
