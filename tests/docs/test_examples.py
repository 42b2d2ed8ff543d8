"""The examples in docstrings run."""

import doctest
import importlib
import pkgutil
from pathlib import Path

import pytest
import timm
import torch

import autogate
import rewriters

README = Path(__file__).parents[2] / "README.md"


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


def test_the_readmes_lines_on_files_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = autogate.prepare(timm.create_model("test_resnet", num_classes=10))
    with torch.no_grad():
        autogate.gates(model).alpha[::3] = 0
    slim = autogate.finalize(model, warn=False).eval()
    section = README.read_text().split("## Save and load")[1].split("\n## ")[0]
    names = {"autogate": autogate, "slim": slim}
    exec(section.split("```python")[1].split("```")[0], names)
    example = torch.randn(2, 3, 64, 64)
    assert names["slim"] is not slim
    assert torch.equal(names["slim"](example), slim(example))


def test_the_verbs_have_examples():
    verbs = ("api.prepare", "api.gates", "api.step", "files.saving.save", "files.timm_text.to_timm_text")
    assert {f"autogate.{verb}" for verb in verbs} <= {test.name for test in EXAMPLES}
