"""Summaries of models that choose their channels for each image."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import timm
import torch
from torch import nn
from typer.testing import CliRunner

import autogate
from autogate import adaptive
from autogate.cli import app
from tests.autogate.saliency.nets import IMAGES, Branches, Tokens, choose, lively


@pytest.fixture
def model() -> nn.Module:
    found = adaptive.prepare(lively(Branches()), IMAGES, flops=0.7, steps=100)
    choose(found)
    return found


def test_use_isnt_known_before_a_forward(model):
    found = autogate.summary(model)
    assert found.share is None and found.images == 0 and all(layer.mean is None for layer in found.layers)
    assert "not known: run the model, or autogate.adaptive.use(model, batches)" in str(found)
    plain = Branches()
    assert found.params == sum(parameter.numel() for parameter in plain.parameters())
    assert found.own_params == sum(parameter.numel() for parameter in model.parameters()) - found.params
    gated = autogate.summary(autogate.prepare(plain, IMAGES, flops=0.7))
    assert found.all_flops == gated.all_flops
    assert {layer.module: layer.all_macs for layer in found.layers} == {
        layer.module: layer.all_macs for layer in gated.layers
    }


def test_the_use_of_the_latest_forward_is_told(model):
    with torch.no_grad():
        model(IMAGES[:2])
    found = autogate.summary(model)
    assert found.images == 2
    assert found.share * found.all_flops == pytest.approx(float(adaptive.cost(model).mean()))
    stem = found.layers[0]
    code = model.stem[0].saliency.open
    assert (stem.module, stem.kind, stem.channels) == ("stem.0", "chosen", 16)
    assert (stem.never, stem.always) == (int((~code.any(0)).sum()), int(code.all(0).sum()))
    assert {layer.module: layer.kind for layer in found.layers if layer.kind != "chosen"} == {
        "depthwise.0": "follows", "head": "reads",
    }  # fmt: skip


def test_why_layers_do_not_choose_is_told():
    found = autogate.summary(adaptive.prepare(Tokens(), IMAGES, flops=0.9))
    reasons = {layer.module: layer.why for layer in found.layers if layer.why}
    assert reasons["head"] == "all of its outputs are needed (autogate.prepare would pin them too)"
    assert reasons["fc2"] == reasons["out"] == "its outputs are added to those of other layers" and len(reasons) == 3
    assert "why it doesn't choose" in str(found)


def test_what_was_measured_is_told_until_the_model_changes(model):
    found = adaptive.use(model, [IMAGES])
    with torch.no_grad():
        model(IMAGES[:1])
    told = autogate.summary(model)
    assert (told.images, told.share) == (3, float(found.shares.mean()))
    assert told == autogate.summary(copy.deepcopy(model))
    share = adaptive.budget(model, flops=0.3, batches=[IMAGES[:2]])
    told = autogate.summary(model)
    assert (told.images, told.share) == (2, share)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)
    model.train()(IMAGES[:1]).sum().backward()
    optimizer.step()
    assert autogate.summary(model).images == 1


def test_a_failed_budget_keeps_what_was_measured(model):
    adaptive.use(model, [IMAGES])
    with pytest.raises(autogate.AutogateError, match="every image takes"):
        adaptive.budget(model, flops=1e-4, batches=[IMAGES[:2]])
    assert autogate.summary(model).images == 3


def test_tables_json_notebook_and_command_line(model, tmp_path: Path):
    torch.manual_seed(0)
    model = adaptive.prepare(timm.create_model("test_resnet", num_classes=4), torch.randn(2, 3, 32, 32), flops=0.8)
    choose(model)
    adaptive.use(model, [torch.randn(5, 3, 32, 32)])
    found = autogate.summary(model)
    text = str(found)
    assert f"{found.share:.1%} on average of 5 images" in text and "sometimes" in text and "80.0%" in text
    assert "whole" in text and found._repr_html_().startswith("<pre")
    autogate.save(model, tmp_path / "adaptive.safetensors")
    told = CliRunner().invoke(app, ["summary", str(tmp_path / "adaptive.safetensors"), "--json"])
    assert told.exit_code == 0, told.output
    written = json.loads(told.output)
    assert written == json.loads(found.to_json()) and written["layers"][1]["sometimes"] == found.layers[1].sometimes
    refused = CliRunner().invoke(app, ["inspect", str(tmp_path / "adaptive.safetensors")])
    assert refused.exit_code == 1 and "it chooses its channels for each image" in refused.output
