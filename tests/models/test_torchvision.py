"""torchvision's models are slimmed exactly, and example inputs are given in each way."""

import pytest
import torch
import torchvision
from torch import nn
from torchvision.models import detection, segmentation, video

import autogate
from benchmarks.parts import finalize_compared, kill, randomise_constants, randomise_norms
from tests.slow import slow_but


class Swapped(nn.Module):
    """A model whose batch is a keyword argument."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, pixels, *, scale):
        return self.model(pixels * scale)


def backbone_and_heads(detector: nn.Module) -> nn.Module:
    """What a detector does before it picks boxes, which depends on the values: the part that is prepared."""

    class Dense(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone = detector.backbone
            self.head = getattr(detector, "head", None) or detector.rpn.head

        def forward(self, images):
            features = list(self.backbone(images).values())
            return self.head(features)

    return Dense()


IMAGE = (2, 3, 64, 64)

MODELS = {
    "shufflenet_v2_x0_5": (lambda: torchvision.models.shufflenet_v2_x0_5(num_classes=10), IMAGE),
    "squeezenet1_1": (lambda: torchvision.models.squeezenet1_1(num_classes=10), IMAGE),
    "densenet": (lambda: torchvision.models.DenseNet(8, (2, 2, 2, 2), 16, num_classes=10), IMAGE),
    "swin": (
        lambda: torchvision.models.SwinTransformer([4, 4], 32, [1, 1], [2, 4], [7, 7], num_classes=10), (2, 3, 56, 56)
    ),
    "fcn": (
        lambda: segmentation.fcn_resnet50(weights=None, weights_backbone=None, aux_loss=True, num_classes=5), IMAGE
    ),
    "ssdlite": (
        lambda: backbone_and_heads(detection.ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None)),
        (2, 3, 96, 96),
    ),
    "faster_rcnn": (
        lambda: backbone_and_heads(detection.fasterrcnn_mobilenet_v3_large_fpn(weights=None, weights_backbone=None)),
        IMAGE,
    ),
    "r3d_18": (lambda: video.r3d_18(num_classes=10), (2, 3, 4, 32, 32)),
}  # fmt: skip


def build(name: str) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    make, shape = MODELS[name]
    model = make()
    randomise_norms(model)
    randomise_constants(model)
    return model.eval().double(), 10 * torch.randn(shape).double()  # or biases are most of what comes out


@pytest.mark.parametrize("name", slow_but(("squeezenet1_1", "densenet", "ssdlite"), MODELS))
def test_slim_outputs_are_the_gated_models(name):
    model, example = build(name)
    model = autogate.prepare(model, example, flops=0.95)
    assert autogate.summary(model).reach >= 0.9
    kill(model, 0.5, 1)
    assert autogate.summary(model).flops < 0.45 * autogate.summary(model).all_flops
    more = torch.cat([example, example[:1]])
    assert finalize_compared(model, ((example,), {}), ((more,), {})) <= 1e-10


@pytest.mark.parametrize("named", [False, True], ids=["tuple", "dict"])
def test_example_inputs_by_position_and_by_name(named):
    model, example = build("squeezenet1_1")
    args, kwargs = ((), {"pixels": example, "scale": torch.tensor(0.5)}) if named else ((example,), {})
    model = autogate.prepare(Swapped(model) if named else model, kwargs or args, flops=0.9)
    kill(model, 0.4, 0)
    assert finalize_compared(model, (args, kwargs)) <= 1e-10
