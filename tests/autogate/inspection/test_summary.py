"""Summaries of gated, slim and loaded models, in tables, as JSON, in a notebook and on the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import timm
import torch
from torch import nn
from typer.testing import CliRunner

import autogate
from autogate.cli import app
from tests.autogate.loops.small_nets import EXAMPLE, Halves, Residual


def gated(dead: int = 10, network: type[nn.Module] = Residual, **options) -> nn.Module:
    torch.manual_seed(0)
    model = autogate.prepare(network(), EXAMPLE, **options)
    with torch.no_grad():
        autogate.gates(model).alpha[:dead] = 0
    return model


def test_a_slim_model_is_told_as_its_gates_were():
    model = gated()
    before = autogate.summary(model)
    after = autogate.summary(autogate.finalize(model, warn=False))
    assert (after.layers, after.flops, after.all_flops, after.params, after.all_params) == (
        before.layers, before.flops, before.all_flops, before.params, before.all_params,
    )  # fmt: skip
    assert after.progress is None and after.reach is None and not after.pins
    stem = next(layer for layer in after.layers if layer.module == "stem.0")
    assert f"16 -> {stem.outputs}" in str(after) and stem.outputs == model.stem[0].out_channels < 16


def test_a_model_slimmed_twice_is_compared_with_the_first():
    whole = autogate.summary(gated()).all_flops
    once = autogate.finalize(gated(), warn=False)
    left = autogate.summary(once).flops
    autogate.prepare(once, EXAMPLE)
    with torch.no_grad():
        autogate.gates(once).alpha[:5] = 0
    assert autogate.summary(once).all_flops == left
    twice = autogate.summary(autogate.finalize(once, warn=False))
    assert twice.all_flops == whole and twice.flops < left
    assert [layer.all_outputs for layer in twice.layers] == [16, 24, 16, 4]


def test_what_was_rewritten_and_removed():
    found = autogate.summary(autogate.finalize(gated(dead=45, network=Halves), warn=False))
    assert found.rewritten == {"": "sizes"}
    assert "(the model)" in str(found) and "its forward was rewritten: sizes" in str(found)
    model = autogate.prepare(timm.create_model("test_resnet"), torch.randn(2, 3, 32, 32))
    bank = autogate.gates(model)
    inner = [label for label in range(len(bank.alpha)) if "layer2.0.conv2.weight[1]" in bank.describe([label])]
    with torch.no_grad():
        bank.alpha[inner] = 0
    found = autogate.summary(autogate.finalize(model, warn=False))
    assert "layer2.0.conv1" in found.removed and "removed: nothing was left in it" in str(found)
    gone = next(layer for layer in found.layers if layer.module == "layer2.0.conv1")
    assert gone.outputs == 0 and gone.macs == 0 < gone.all_macs


@pytest.mark.parametrize("trained", [False, True])
def test_convolutions_on_shortcuts_count_as_they_are_left(trained):
    model = gated(shortcuts="conv", dead=4)
    if trained:
        with torch.no_grad():
            model.shortcut_conv.weight.normal_()
    slim = autogate.finalize(model, warn=False)
    found = autogate.summary(slim)
    assert len(found.shortcuts) == hasattr(slim, "shortcut_conv") == trained
    assert found.params == sum(p.numel() for p in slim.parameters())
    assert found.all_params == sum(p.numel() for p in Residual().parameters())


def test_its_json_has_all_of_it():
    found = autogate.summary(gated())
    read = json.loads(found.to_json())
    assert read["flops"] == found.flops and len(read["layers"]) == len(found.layers)
    assert read["progress"]["dead"] == 10 and read["pins"][0]["reason"]
    assert json.loads(autogate.summary(autogate.finalize(gated(), warn=False)).to_json())["progress"] is None


def test_a_notebook_and_a_table():
    found = autogate.summary(gated())
    assert found._repr_html_().startswith("<pre") and "stem.0" in found._repr_html_()
    assert found.table().row_count == 4 and found.table().columns[0].header == "layer"


def test_a_file_on_the_command_line(slim: Path):
    told = CliRunner().invoke(app, ["summary", str(slim)])
    assert told.exit_code == 0 and told.output.strip() == str(autogate.summary(autogate.load(slim)))
    told = CliRunner().invoke(app, ["summary", str(slim), "--json"])
    assert json.loads(told.output)["params"] == sum(p.numel() for p in autogate.load(slim).parameters())
    assert CliRunner().invoke(app, ["summary", "nothere.safetensors"]).exit_code == 2


def test_names_out_of_a_file_are_no_markup():
    model = nn.Sequential()
    model.add_module("[bold", nn.Linear(4, 8))
    model.add_module("[/red]", nn.Linear(8, 2))
    found = autogate.summary(autogate.prepare(model, torch.randn(2, 4)))
    assert "[/red]" in str(found) and "[bold" in str(found)


def test_a_dense_model_has_no_summary():
    with pytest.raises(autogate.AutogateError, match="it has no gates"):
        autogate.summary(Residual())
