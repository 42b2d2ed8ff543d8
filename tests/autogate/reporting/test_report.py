"""The page about a run: its numbers, its pictures, and how a browser shows it."""

from __future__ import annotations

import re
import shutil
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner

import autogate
from autogate.cli import app
from autogate.reporting import read_report, write_report
from autogate.training import Budget, Images, Learning, Network, Recipe, RunFolder, start
from tests.autogate.training.runs import After

PICTURES = ("course", "widths", "gates", "groups")


@pytest.fixture(scope="module")
def run(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two epochs."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    start(asked(pictures), folder)
    return folder


def asked(pictures: Path) -> Recipe:
    images = Images(str(pictures), batch_size=8, workers=0)
    learning = Learning(epochs=2, model_ema=True)
    return Recipe(Network("test_resnet", img_size=32), images, Budget(flops=0.7), learning, device="cpu")


@pytest.fixture(scope="module")
def page(run: Path) -> Path:
    return write_report(read_report(run), run / "report")


def drawings(page: Path) -> list[ElementTree.Element]:
    """The svg elements of a page."""
    text = page.read_text(encoding="utf-8")
    return [ElementTree.fromstring(part.split("</svg>")[0] + "</svg>") for part in _from("<svg", text)]


def _from(mark: str, text: str) -> list[str]:
    return [mark + part for part in text.split(mark)[1:]]


def test_the_page_has_the_numbers_of_the_run(page: Path, run: Path):
    text, folder = page.read_text(encoding="utf-8"), RunFolder(run)
    result, last = folder.result(), folder.metrics()[-1]
    for shown in (f"{result.flops / result.dense_flops:.1%}", f"{result.accuracy:.2f} %", f"<td>{last.live}</td>"):
        assert shown in text
    assert "Unfinished" not in text and "test_resnet" in text


def test_the_pictures_show_the_run(page: Path, run: Path):
    words = [[piece for element in svg.iter() if (piece := (element.text or "").strip())] for svg in drawings(page)]
    course, widths, gates, groups = words
    assert {"FLOPs", "parameters", "slim", "averaged weights", "epoch"} <= set(course)
    modules = [layer.module for layer in RunFolder(run).info().layers]
    assert set(modules) <= set(widths) and set(modules) <= set(groups)
    assert "dead" in gates
    numbered = read_report(run).channel_map.groups()
    assert {f"{index}: {len(group.classes)}" for index, group in enumerate(numbered)} <= set(groups)
    for name in PICTURES:
        with Image.open(page.parent / f"{name}.png") as image:
            assert min(image.size) > 200 and len(set(image.convert("L").resize((64, 64)).getdata())) > 5


def test_a_run_that_is_not_finished_is_reported(pictures: Path, tmp_path: Path):
    stop, folder = After(1), tmp_path / "run"
    assert start(asked(pictures), folder, callbacks=[stop], stop=stop) is None
    told = CliRunner().invoke(app, ["report", str(folder), "--out", str(tmp_path / "page")])
    assert told.exit_code == 0, told.output
    text = (tmp_path / "page" / "index.html").read_text(encoding="utf-8")
    assert "Unfinished: 0 of 6 steps" in text  # no epoch is over but the one before the first
    timed = CliRunner().invoke(app, ["report", str(folder), "--latency"])
    assert timed.exit_code == 1 and f"autogate finalize {folder}" in timed.output


def test_names_from_elsewhere_are_escaped(run: Path, tmp_path: Path):
    copy = tmp_path / "run"
    shutil.copytree(run, copy, ignore=shutil.ignore_patterns("report"))
    info = copy / "run.json"
    data = RunFolder(copy).info().recipe.images.data
    info.write_text(info.read_text().replace(data, "<script>alert(1)</script>"))
    text = write_report(read_report(copy), tmp_path).read_text(encoding="utf-8")
    assert "<script" not in text and "&lt;script&gt;" in text


def test_what_is_wrong_is_told(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def invoke(*words: object) -> Any:
        return CliRunner().invoke(app, ["report", *map(str, words)])

    assert invoke(tmp_path / "nowhere").exit_code == 2
    nothing = invoke(tmp_path)
    assert nothing.exit_code == 1 and "no run in this folder" in nothing.output
    (tmp_path / "file").touch()
    used = invoke(run, "--out", tmp_path / "file")
    assert used.exit_code == 1 and "can't be made" in used.output
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(autogate.AutogateError, match=r"pip install 'autogate\[report\]'"):
        write_report(read_report(run), tmp_path / "page")


BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Chromium without a window."""
    webdriver = pytest.importorskip("selenium.webdriver")
    binary = next(filter(None, map(shutil.which, BROWSERS)), None)
    driver = shutil.which("chromedriver")
    if binary is None or driver is None:
        pytest.skip("there is no Chromium with its chromedriver here")
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('browser')}"):
        options.add_argument(flag)
    opened = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield opened
    opened.quit()


LOOK = """
const shown = element => { const box = element.getBoundingClientRect(); return box.width > 0 && box.height > 0; };
return {
  width: document.documentElement.scrollWidth,
  loaded: performance.getEntriesByType("resource").length,
  letters: Math.min(...[...document.querySelectorAll("svg text")].map(text => text.getBoundingClientRect().height)),
  drawings: [...document.querySelectorAll(".drawing svg")].map(svg => ({
    name: svg.closest("section").id,
    wide: svg.getBoundingClientRect().width,
    shapes: [...svg.querySelectorAll("path, use, image")].filter(shown).length,
  })),
};
"""


@pytest.mark.parametrize(("width", "height"), [(1366, 768), (390, 844)])
def test_a_browser_draws_it(page: Path, browser: Any, width: int, height: int):
    screen = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    browser.get(page.resolve().as_uri())
    seen = browser.execute_script(LOOK)
    assert seen["width"] <= width  # nothing to be scrolled sideways
    assert seen["loaded"] == 0
    assert seen["letters"] >= 8  # pixels
    assert [drawing["name"] for drawing in seen["drawings"]] == list(PICTURES)
    for drawing in seen["drawings"]:
        assert drawing["shapes"] > 15 and 0.75 * min(width, 500) < drawing["wide"] < width, drawing
    assert browser.get_log("browser") == []


def test_layers_are_listed_with_their_widths(page: Path, run: Path):
    text, folder = page.read_text(encoding="utf-8"), RunFolder(run)
    last = folder.gates()[-1]
    for layer, outputs in zip(folder.info().layers, last.outputs, strict=True):
        shown = str(outputs) if outputs == layer.outputs else f"{layer.outputs} → {outputs}"
        assert re.search(rf"<td>{layer.module}</td><td>[^<]*</td><td>{shown}</td>", text), layer
    assert any(outputs < layer.outputs for layer, outputs in zip(folder.info().layers, last.outputs, strict=True))


def test_options_that_are_not_in_force_are_left_out(page: Path, run: Path):
    names = re.findall(r"<tr><th>([^<]*)</th>", page.read_text(encoding="utf-8").split('id="options"')[1])
    assert {"model ema decay", "momentum", "lr"} <= set(names)
    idle = {"amp dtype", "warmup lr", "decay epochs", "decay rate", "mixup", "drop", "round to", "limits"}
    assert not idle & set(names)


def test_modules_that_were_removed_or_rewritten_are_listed(page: Path, run: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setattr("autogate.reporting.page._pictures", lambda report, out: [])
    assert 'id="changes"' not in page.read_text(encoding="utf-8")
    found = read_report(run)
    changed = replace(found.result, removed=("layer2.0.conv1",), rewritten={"layer2.0": "branches", "": "sizes"})
    text = write_report(replace(found, result=changed), tmp_path).read_text(encoding="utf-8")
    for row in (
        "<td>layer2.0.conv1</td><td>removed: nothing was left in it</td>",
        "<td>layer2.0</td><td>forward rewritten: branches</td>",
        "<td>(the model)</td><td>forward rewritten: sizes</td>",
    ):
        assert row in text
