"""The code on the pages of docs/ and the programs in examples/ run."""

import ast
import importlib.util
import os
import re
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from accelerate.state import AcceleratorState, GradientState
from PIL import Image

import autogate
from autogate.criteria import CRITERIA
from rewriters import AutogateError
from rewriters.labelling.rules import RULES

ROOT = Path(__file__).parents[2]


def blocks(text: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)


PAGES = sorted(path.name for path in (ROOT / "docs").glob("*.md") if blocks(path.read_text()))
WHOLE = {"adaptive.md", "index.md", "how-it-works.md", "subnets.md", "torch-pruning.md"}
"""Pages whose sections go on where the one before ended."""

SLOW = {"docs/index.md", "docs/training-loops.md, torch.compile"}
"""What is told there and takes long; the other pages run by default."""

OPTIONAL = {"segmentation_models_pytorch", "torch_pruning", "torchao", "ultralytics"}
"""Libraries that a guide may need and autogate doesn't."""


def sections(page: str) -> Iterator[Any]:
    """The code of each section of a page, behind that of the page's beginning; of the page where it is told at once."""
    text = (ROOT / "docs" / page).read_text()
    if page in WHOLE:
        yield section(f"docs/{page}", blocks(text))
        return
    beginning, *rest = re.split(r"^## (.*)\n", text, flags=re.MULTILINE)
    for title, text in zip(rest[::2], rest[1::2], strict=True):
        if blocks(text):
            yield section(f"docs/{page}, {title}", [*blocks(beginning), *blocks(text)])


def section(place: str, codes: list[str]) -> Any:
    return pytest.param(place, codes, id=place, marks=[pytest.mark.slow] if place in SLOW else [])


def imported(code: str) -> set[str]:
    """Names of the packages that some code imports."""
    nodes = list(ast.walk(ast.parse(code)))
    plain = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    return {name.split(".")[0] for name in plain | {node.module for node in nodes if isinstance(node, ast.ImportFrom)}}


def draw_boxes(folder: Path) -> None:
    """What pages on detection read: `data.yaml`, and images with a box in each."""
    for split in ("train", "val"):
        for kind in ("images", "labels"):
            (folder / kind / split).mkdir(parents=True)
        for index in range(16):
            pixels = np.full((64, 64, 3), 40, np.uint8)
            pixels[16:48, index : index + 32, index % 2] = 200
            Image.fromarray(pixels).save(folder / "images" / split / f"{index}.png")
            box = f"{index % 2} {(index + 16) / 64} 0.5 0.5 0.5"
            (folder / "labels" / split / f"{index}.txt").write_text(box)
    (folder / "data.yaml").write_text(f"path: {folder}\ntrain: images/train\nval: images/val\nnames: [red, green]\n")


def draw_slim_file() -> None:
    """A slim model that knows its classes, and a picture."""
    model = autogate.prepare(timm.create_model("test_resnet", num_classes=2), torch.randn(2, 3, 32, 32))
    slim = autogate.finalize(model, warn=False)
    slim.pretrained_cfg = {**slim.pretrained_cfg, "input_size": (3, 32, 32), "label_names": ("cat", "dog")}
    autogate.save(slim, "slim.safetensors")
    Image.fromarray(np.zeros((40, 60, 3), np.uint8)).save("picture.png")


READS = {"docs/command-line.md, Images and classes": draw_slim_file}
"""What makes the files that a section reads."""


@pytest.fixture
def alone(tmp_path, monkeypatch):
    """An empty folder, and a process that is a world of its own."""
    monkeypatch.chdir(tmp_path)
    group = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    for name, value in {**group, "YOLO_CONFIG_DIR": str(tmp_path), "YOLO_OFFLINE": "true"}.items():
        monkeypatch.setenv(name, value)
    draw_boxes(tmp_path)
    torch.manual_seed(0)
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    torch._dynamo.reset()
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("place", "codes"), [section for page in PAGES for section in sections(page)])
def test_the_code_of_a_section_runs(place, codes, alone):
    missing = [name for name in OPTIONAL & imported("\n".join(codes)) if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"needs {', '.join(missing)}")
    READS.get(place, lambda: None)()
    names = {"__name__": "page"}
    for code in codes:
        exec(compile(code, place, "exec"), names)
    if "slim" in names and "network" in names:
        assert sum(p.numel() for p in names["slim"].parameters()) < sum(
            p.numel() for p in names["network"]().parameters()
        )


@pytest.fixture
def registered():
    """Rules and criteria that are registered meanwhile are forgotten afterwards."""
    before = [(known, dict(known)) for known in (RULES, CRITERIA)]
    yield
    for known, then in before:
        known.clear()
        known.update(then)


def contributed(title: str) -> list[str]:
    """The code of a section of the contributors' page."""
    _, *rest = re.split(r"^## (.*)\n", (ROOT / "CONTRIBUTING.md").read_text(), flags=re.MULTILINE)
    return blocks(dict(zip(rest[::2], rest[1::2], strict=True))[title])


def test_the_new_op_of_the_contributors_page_is_added_as_it_says(registered):
    """The rule stands on the page with its tests, so these are run as tests, and fail without it."""
    rule, *tests = contributed("A new op")
    names: dict[str, Any] = {"__name__": "page"}
    exec(compile("\n".join(tests), "CONTRIBUTING.md, tests", "exec"), names)
    checks = [check for name, check in names.items() if name.startswith("test_")]
    assert len(checks) == 3
    with pytest.raises(AssertionError):
        checks[0]()  # no rule describes the op yet
    exec(compile(rule, "CONTRIBUTING.md, rule", "exec"), {"__name__": "page"})
    assert torch.ops.aten.bucketize.Tensor in RULES
    for check in checks:
        check()


def test_the_new_criterion_of_the_contributors_page_is_added_as_it_says(registered):
    own, test = contributed("A new criterion")
    names: dict[str, Any] = {"__name__": "page"}
    exec(compile(test, "CONTRIBUTING.md, test", "exec"), names)
    with pytest.raises(AutogateError, match="no criterion 'range'"):
        names["test_the_narrowest_range_closes"]()
    exec(compile(own, "CONTRIBUTING.md, criterion", "exec"), {"__name__": "page"})
    names["test_the_narrowest_range_closes"]()


@pytest.mark.parametrize("name", ["labels", "subnets"])
def test_a_picture_is_what_its_script_draws(name: str):
    script = runpy.run_path(str(ROOT / "docs" / "figures" / f"{name}.py"))
    assert script["FILE"].read_text() == script["draw"](), f"run python docs/figures/{name}.py"


@pytest.mark.slow
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
