"""What agrees across the repository: public names and the reference, versions, links."""

import importlib
import inspect
import re
from pathlib import Path

import pytest

import autogate
import rewriters

ROOT = Path(__file__).parents[2]
REFERENCE = "\n".join(page.read_text() for page in (ROOT / "docs" / "reference").glob("*.md"))
SHOWN = {path.rsplit(".", 1)[-1] for path in re.findall(r"^::: ([\w.]+)$", REFERENCE, flags=re.MULTILINE)}
PUBLIC = [name for name in autogate.__all__ if name != "__version__"]


@pytest.mark.parametrize("package", [autogate, rewriters], ids=lambda package: package.__name__)
def test_public_names_are_in_the_reference(package):
    names = set(package.__all__) - {"__version__"}
    faces = {name for name in names if inspect.ismodule(getattr(package, name))}  # their functions are shown instead
    verbs = {
        name for face in faces for name, value in vars(getattr(package, face)).items()
        if inspect.isfunction(value) and value.__module__ == f"autogate.{face}" and not name.startswith("_")
    }  # fmt: skip
    assert names - faces | verbs <= SHOWN


@pytest.mark.parametrize("function", [name for name in PUBLIC if inspect.isfunction(getattr(autogate, name))])
def test_a_public_function_tells_of_its_arguments_and_errors(function):
    text = inspect.getdoc(getattr(autogate, function))
    assert text and re.search(r"^Raises:\n    \w+Error: ", text, flags=re.MULTILINE)
    arguments = text.split("\nArgs:\n")[1].split("\nRaises:\n")[0]
    told = re.findall(r"^    (\w+): ", arguments, flags=re.MULTILINE)
    assert told == list(inspect.signature(getattr(autogate, function)).parameters)


@pytest.mark.parametrize("package", [autogate, rewriters], ids=lambda package: package.__name__)
def test_public_classes_and_their_methods_have_docstrings(package):
    classes = [value for name in package.__all__ if inspect.isclass(value := getattr(package, name))]
    for value in classes:
        assert value.__doc__ and not value.__doc__.startswith(f"{value.__name__}("), value
        for name, member in vars(value).items():
            if not name.startswith("_") and (inspect.isfunction(member) or isinstance(member, property)):
                assert inspect.getdoc(getattr(value, name)), f"{value.__name__}.{name}"


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks").rglob("*.py")), ids=lambda path: path.stem)
def test_a_benchmark_finds_what_it_imports(path):
    try:
        importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))
    except ModuleNotFoundError as error:
        if str(error.name).split(".")[0] in ("autogate", "benchmarks", "rewriters"):
            raise
        pytest.skip(f"{error.name} is not installed")


def test_every_dependency_has_a_lower_bound():
    text = (ROOT / "pyproject.toml").read_text().split("[project.scripts]")[0].split("dependencies = ")[1]
    named = [name for name in re.findall(r'"([^"]+)"', text) if not name.startswith("autogate[")]
    assert len(named) > 20 and [name for name in named if not re.search(r"[>=]=", name)] == []


def test_ruff_has_one_version():
    pinned = set(re.findall(r"ruff==([\d.]+)", (ROOT / "pyproject.toml").read_text()))
    assert len(pinned) == 1
    assert set(re.findall(r"ruff==([\d.]+)", (ROOT / ".pre-commit-config.yaml").read_text())) == pinned


def test_the_version_is_a_semantic_one_and_stands_in_one_place():
    assert re.fullmatch(r"\d+\.\d+\.\d+(-[0-9A-Za-z.-]+)?", autogate.__version__)
    holding = [path.name for path in (*ROOT.glob("*.toml"), *(ROOT / "autogate").rglob("*.py"))
               if f'"{autogate.__version__}"' in path.read_text()]  # fmt: skip
    assert holding == ["version.py"]


def test_changes_are_told_of_this_version():
    text = (ROOT / "CHANGELOG.md").read_text()
    assert re.search(r"^## \[Unreleased\]$", text, flags=re.MULTILINE) and autogate.__version__ in text


PAGES = (*(ROOT / "docs").rglob("*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_code_on_a_page_fits_beside_its_menus(page):
    blocks = re.findall(r"^ *```\w*\n(.*?)^ *```$", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    assert [line for block in blocks for line in block.splitlines() if len(line) > 88] == []


def test_the_first_page_has_the_words_that_people_search_for():
    text = (ROOT / "docs" / "index.md").read_text()
    assert all(words in text for words in ("structured pruning", "channel pruning", "Torch-Pruning"))


@pytest.mark.parametrize("page", ["README.md", "CHANGELOG.md"])
def test_links_between_files_lead_somewhere(page):
    targets = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", (ROOT / page).read_text())
    assert [target for target in targets if not (ROOT / target).exists()] == []
