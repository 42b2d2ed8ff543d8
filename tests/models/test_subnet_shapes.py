"""Subnets of models that aren't ResNets: depthwise layers, layer norms, heads, a decoder that concatenates."""

import copy

import pytest
import timm
import torch
from torch import nn

import autogate
from autogate import subnets
from benchmarks.parts import randomise_norms


def deeplab() -> nn.Module:
    smp = pytest.importorskip("segmentation_models_pytorch")
    return smp.DeepLabV3Plus("timm-mobilenetv3_small_minimal_100", encoder_weights=None, classes=3)


SHAPES = {
    "mobilenetv2_035": (lambda: timm.create_model("mobilenetv2_035", num_classes=4), 64),
    "convnext": (lambda: timm.create_model("test_convnext", num_classes=4), 64),
    "vit": (lambda: timm.create_model("test_vit", num_classes=4, img_size=64), 64),
    "deeplab": (deeplab, 64),
}


@pytest.mark.slow
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("name", SHAPES)
def test_every_subnet_is_the_slim_model_of_its_channels(name, nested):
    torch.manual_seed(0)
    build, side = SHAPES[name]
    model = build().double().eval()
    randomise_norms(model)
    example = torch.randn(2, 3, side, side, dtype=torch.float64)
    found = subnets.find(model, example, flops=(0.3, 0.6), by="l2")
    switchable = subnets.fuse(copy.deepcopy(model), found, nested=nested)
    for number, share in enumerate((0.3, 0.6)):
        prepared = autogate.close(autogate.prepare(copy.deepcopy(model), example, flops=0.6), by="l2")
        if share < 0.6:
            autogate.close(prepared, by="l2", flops=share)
        slim = autogate.finalize(prepared, warn=False)
        subnets.switch(switchable, number)
        for x in (example, torch.randn(3, 3, side, side, dtype=torch.float64)):
            with torch.no_grad():
                torch.testing.assert_close(switchable.eval()(x), slim.eval()(x), rtol=1e-9, atol=1e-9)
    with torch.no_grad():
        width = subnets.switch(switchable, flops=0.45, between=True)
        assert width.shares["FLOPs"] <= 0.45
        subnets.switch(switchable, "full")
        torch.testing.assert_close(switchable(example), model(example), rtol=1e-9, atol=1e-9)
