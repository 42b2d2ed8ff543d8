"""What is imported when: the library without extras, the command line without PyTorch."""

from __future__ import annotations

import ast
import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import autogate
from autogate.cli import COMMANDS, app

ROOT = Path(__file__).parents[2]


def in_a_new_process(code: str, blocked: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    """Run code where some packages are as if they were not installed."""
    block = f"""
import sys
class Without:
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, path=None, target=None):
        return None if name.split(".")[0] in {blocked!r} else self.finder.find_spec(name, path, target)
    def __getattr__(self, name):
        return getattr(self.finder, name)
sys.meta_path[:] = map(Without, sys.meta_path)
"""
    return subprocess.run([sys.executable, "-c", block + code], cwd=ROOT, capture_output=True, text=True)


EXTRAS = ("typer", "sklearn", "matplotlib", "onnx", "onnxscript", "onnxruntime", "lightning", "tensorboard")


@pytest.mark.slow
def test_the_library_needs_no_extras():
    code = """
import os
os.environ.update(CUDA_HOME=".", CUDA_VISIBLE_DEVICES="")  # torch says so where it looks for a compiler of CUDA
import autogate, timm, torch
from autogate.budget import timer
model = autogate.prepare(timm.create_model("test_resnet"), torch.randn(2, 3, 32, 32))
print(autogate.summary(model), timer("pass", {}))
"""
    done = in_a_new_process(code, EXTRAS)
    assert done.returncode == 0, done.stderr
    assert "CUDA" not in done.stderr


def test_the_command_line_says_which_extra_it_needs():
    done = in_a_new_process("import autogate.cli", EXTRAS)
    assert done.stderr.rstrip().endswith("the command line needs typer: pip install 'autogate[cli]'")
    done = in_a_new_process("from autogate import digits; digits.load()", EXTRAS)
    assert done.stderr.rstrip().endswith("the handwritten digits come with scikit-learn. pip install 'autogate[demo]'")


@pytest.mark.parametrize("option", ["--help", "--version"])
def test_the_list_of_commands_imports_neither_torch_nor_timm(option):
    code = f"""
import sys
sys.argv = ["autogate", {option!r}]
from autogate.cli import app
try:
    app()
finally:
    heavy = [name for name in ("torch", "timm", "sklearn", "rewriters", "networkx", "pydantic") if name in sys.modules]
    print(heavy, file=sys.stderr)
"""
    done = in_a_new_process(code)
    assert (done.returncode, done.stderr.strip()) == (0, "[]")
    assert autogate.__version__ in done.stdout if option == "--version" else "inspect" in done.stdout


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_is_listed_as_it_describes_itself(name):
    command = getattr(importlib.import_module(f"autogate.cli.{name}"), name)
    first = " ".join(command.__doc__.split("\n\n")[0].split())
    assert first == COMMANDS[name]
    help = CliRunner().invoke(app, [name, "--help"], env={"COLUMNS": "200"}).stdout
    assert f"autogate {name}" in help.replace("root ", "autogate ") and first in " ".join(help.split())


def test_every_command_is_listed():
    files = {path.stem for path in (ROOT / "autogate" / "cli").glob("*.py")}
    helpers = {"__init__", "__main__", "bench_adaptive", "common", "functions", "method_options"}
    assert files - helpers == set(COMMANDS)


def test_an_unknown_command_is_wrong_usage():
    found = CliRunner().invoke(app, ["prepare"])
    assert found.exit_code == 2 and "No such command" in found.output


def test_what_type_checkers_see_is_what_is_exported():
    tree = ast.parse((ROOT / "autogate" / "__init__.py").read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    typed = {node.module: tuple(alias.name for alias in node.names) for node in block.body}
    folders = {f"autogate.{name}": () for name in typed.pop("autogate", ())}  # whole folders
    assert typed | folders == autogate._EXPORTS
    whole = [name.removeprefix("autogate.") for name in folders]
    assert sorted(autogate.__all__) == sorted([*autogate._HOMES, *whole, "__version__"])
    assert set(autogate.__all__) <= set(dir(autogate))
    assert all(getattr(autogate, name) is not None for name in autogate.__all__)


@pytest.mark.slow
def test_folders_are_there_as_if_they_were_imported():
    code = "import autogate; print(autogate.methods.GDP.__name__, autogate.budget.timing.__name__)"
    done = in_a_new_process(code)
    assert done.stdout.split() == ["GDP", "autogate.budget.timing"], done.stderr
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = autogate.nothing


def test_extras_name_each_other():
    """`pip install 'autogate[demo]'` is README's first command: it must bring the command line."""
    text = (ROOT / "pyproject.toml").read_text()
    assert json.dumps("autogate[cli]") in text.split("demo = ")[1].splitlines()[0]
    for page in ("README.md", "docs/index.md", ".ci/run"):
        assert 'pip install -e ".[demo]" && autogate demo' in (ROOT / page).read_text()
