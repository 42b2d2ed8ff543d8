"""The page about a run with a choice of channels for each image."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from PIL import Image

from autogate.reporting import read_report, write_report
from autogate.training import Budget, Choice, Images, Learning, Network, Recipe, RunFolder, start
from tests.autogate.training.runs import After


def asked(pictures: Path) -> Recipe:
    images = Images(str(pictures), batch_size=8, workers=0)
    network, learning = Network("test_resnet", img_size=32), Learning(epochs=1)
    return Recipe(network, images, Budget(flops=0.9), learning, device="cpu", adaptive=Choice())


def test_the_page_draws_what_images_use(pictures: Path, tmp_path: Path):
    folder = RunFolder(tmp_path / "run")
    assert start(asked(pictures), folder.path) is not None
    result, use = folder.result(), folder.use()
    text = write_report(read_report(folder.path), tmp_path / "page").read_text(encoding="utf-8")
    for words in ("with a choice of channels for each image", "90.0 % of the FLOPs", f"{result.shares['FLOPs']:.1%}"):
        assert words in text, words
    for name in ("course", "use", "channels", "costs", "groups"):
        assert f'<section id="{name}">' in text
        assert Image.open(tmp_path / "page" / f"{name}.png").width > 300
    costs = sorted(use.shares)
    shown = re.findall(r"<span>([\d.]+%)</span>", text)
    assert shown == [f"{share:.1%}" for share in (*costs[:8], *costs[::-1][:8])]
    assert text.count("data:image/png;base64,") == 2 and "Gates" not in text and "http://" not in text.split("<svg")[0]
    assert use.channels[0] == pytest.approx(sum(layer.mean * _channels(layer) for layer in use.layers), rel=0.2)


def _channels(layer) -> int:
    return layer.never + layer.sometimes + layer.always


def test_a_run_that_was_stopped_has_a_page_too(pictures: Path, tmp_path: Path):
    stop = After(2)
    assert start(asked(pictures), tmp_path / "run", callbacks=[stop], stop=stop) is None
    text = write_report(read_report(tmp_path / "run"), tmp_path / "page").read_text(encoding="utf-8")
    assert "Unfinished" in text and 'id="use"' not in text
