"""Folders are steps of a model's way: imports run down and through a folder's face; files, classes and functions stay
short."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import networkx
import pytest

ROOT = Path(__file__).parents[1]

ORDER = {
    "rewriters": [
        "shortcuts", "slimming", "analysis", "cross_channel", "forwards", "labelling", "outputs", "recording",
        "undo_log", "interrupts", "errors",
    ],
    "autogate": [
        "cli", "reporting", "training", "integrations", "demo", "outlook", "subnets", "adaptive", "closing", "api",
        "inspection", "files", "switching", "skipping", "saliency", "slim", "compensation", "criteria", "gating",
        "methods", "steering", "budget", "naming", "inputs", "wrappers", "lock", "digits", "version",
    ],
}  # fmt: skip
"""Folders and single files of each package. Each may import from those behind it."""

FACES = {"rewriters.labelling.rules"}
"""Folders within a folder that have a face of their own."""

MOST_LINES, MOST_OF_A_CLASS, MOST_OF_A_FUNCTION = 400, 250, 50
"""A function's lines are counted without its docstring."""


class Import(NamedTuple):
    """`from target import names`, or `import target`, in a module of a package."""

    module: str
    line: int
    target: str
    names: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.module}:{self.line} imports {', '.join(self.names) or 'it'} from {self.target}"


def module_name(path: Path) -> str:
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    return name.removesuffix(".__init__")


def sources(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


@cache
def imports(package: str) -> list[Import]:
    """What the package's modules import from either package."""
    return [found for path in sources(package) for found in _imports_of(module_name(path), path.read_text())]


def _imports_of(module: str, text: str) -> Iterator[Import]:
    for node in ast.walk(ast.parse(text)):  # those inside functions too: they must not dodge a circle
        if isinstance(node, ast.Import):
            found = [Import(module, node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module in ORDER:  # `from autogate import digits`: of the file
            names = [alias.name for alias in node.names]
            files = [name for name in names if name in ORDER[node.module]]
            rest = tuple(name for name in names if name not in files)
            found = [Import(module, node.lineno, f"{node.module}.{name}") for name in files]
            found += [Import(module, node.lineno, node.module, rest)] if rest else []
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = tuple(alias.name for alias in node.names)
            found = [Import(module, node.lineno, node.module, names)]
        else:
            continue
        yield from (one for one in found if one.target.split(".")[0] in ORDER)


def room(module: str) -> str:
    """The folder or file of its package that a module is in: `slimming` for `rewriters.slimming.plan`."""
    return [*module.split("."), ""][1]


def face(module: str) -> str:
    """What other folders import a module's names from."""
    folders = [name for name in FACES if module == name or module.startswith(f"{name}.")]
    return folders[0] if folders else ".".join(module.split(".")[:2])


def reaches_inside(found: Import) -> bool:
    """Whether a module imports from a file of another folder, past its face."""
    here, there = face(found.module), face(found.target)
    around = here.startswith(f"{there}.")  # rules use the labels of the folder that they are in
    return here != there != found.target and not around


def upward(found: list[Import]) -> list[str]:
    """Imports whose arrow runs up: from a room to one that comes before it."""
    wrong = []
    for one in found:
        package = one.module.split(".")[0]
        here, there = room(one.module), room(one.target)
        if one.target.split(".")[0] != package or not here:  # the package's own face is above all
            continue
        order = ORDER[package]
        if not there or order.index(there) < order.index(here):
            wrong.append(str(one))
    return wrong


@pytest.mark.parametrize("package", ORDER)
def test_every_folder_and_file_has_its_place_in_the_order(package):
    places = (ROOT / package).iterdir()
    found = {path.stem for path in places if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert found - {"__init__"} == set(ORDER[package])


@pytest.mark.parametrize("package", ORDER)
def test_arrows_run_down(package):
    assert upward(imports(package)) == []


def test_an_arrow_that_runs_up_is_found():
    low = Import("rewriters.recording.capture", 1, "rewriters.slimming", ("plan",))
    own = Import("rewriters.recording.capture", 2, "rewriters", ("plan",))
    assert upward([low, own]) == [str(low), str(own)]
    assert upward([Import("rewriters.slimming.plan", 1, "rewriters.recording", ("capture",))]) == []


def test_rewriters_does_not_know_autogate():
    assert [str(one) for one in imports("rewriters") if one.target.split(".")[0] == "autogate"] == []


@pytest.mark.parametrize("package", ORDER)
def test_other_folders_are_imported_by_their_faces(package):
    """`from rewriters.slimming import plan`, and not from `rewriters.slimming.plan`."""
    assert [str(one) for one in imports(package) if reaches_inside(one)] == []


@pytest.mark.parametrize("package", ORDER)
def test_no_files_import_each_other_in_a_circle(package):
    modules = {module_name(path) for path in sources(package)}
    graph = networkx.DiGraph()
    for one in imports(package):
        targets = [name for name in (f"{one.target}.{name}" for name in one.names) if name in modules] or [one.target]
        graph.add_edges_from((one.module, target) for target in targets if target != one.module)
    assert [sorted(circle) for circle in networkx.strongly_connected_components(graph) if len(circle) > 1] == []


@pytest.mark.parametrize("package", ORDER)
def test_tests_mirror_the_folders(package):
    tested = {path.name for path in (ROOT / "tests" / package).iterdir() if (path / "__init__.py").exists()}
    folders = {path.name for path in (ROOT / package).iterdir() if (path / "__init__.py").exists()}
    assert folders <= tested


def too_long(path: Path) -> Iterator[str]:
    text = path.read_text()
    where = path.relative_to(ROOT)
    if text.count("\n") > MOST_LINES:
        yield f"{where} has {text.count(chr(10))} lines"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ClassDef) and node.end_lineno - node.lineno >= MOST_OF_A_CLASS:
            yield f"{where}: class {node.name} has {node.end_lineno - node.lineno + 1} lines"
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            body = node.body[1:] if ast.get_docstring(node) is not None else node.body
            if body and node.end_lineno - body[0].lineno >= MOST_OF_A_FUNCTION:
                yield f"{where}: {node.name} has {node.end_lineno - body[0].lineno + 1} lines"


@pytest.mark.parametrize("folder", ["autogate", "rewriters", "tests", "benchmarks", "examples", "docs"])
def test_files_classes_and_functions_are_short(folder):
    assert [found for path in sources(folder) for found in too_long(path)] == []


def test_what_is_too_long_is_found(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    body = "        x = 1\n" * 60
    (tmp_path / "long.py").write_text(f"class A:\n    def f(self):\n{body}" + "y = 1\n" * 350)
    assert list(too_long(tmp_path / "long.py")) == ["long.py has 412 lines", "long.py: f has 60 lines"]


def test_the_architecture_page_is_short():
    assert len((ROOT / "docs" / "architecture.md").read_text().splitlines()) <= 250
