"""Hugging Face's vision models are slimmed exactly: a dict goes in, a dataclass comes out."""

import copy

import pytest
import torch
from torch import nn

import autogate
import rewriters
from benchmarks.parts import LEAST_SPREAD, kill, randomise_norms, settle_norms, spread
from tests.slow import slow_but

transformers = pytest.importorskip("transformers", reason="transformers isn't installed: pip install autogate[test]")

SIZES = {
    "hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 3, "intermediate_size": 32, "image_size": 16,
    "patch_size": 8,
}  # fmt: skip
RESNET = {"embedding_size": 8, "hidden_sizes": [8, 12, 16, 20], "depths": [1, 1, 1, 1], "layer_type": "basic"}

MODELS = {
    "ViTForImageClassification": ("ViTConfig", 16, SIZES),
    "DeiTForImageClassificationWithTeacher": ("DeiTConfig", 16, SIZES),
    "BeitForImageClassification": ("BeitConfig", 16, {**SIZES, "use_relative_position_bias": True}),
    "SwinForImageClassification": (
        "SwinConfig",
        16,
        {"image_size": 16, "patch_size": 2, "embed_dim": 16, "depths": [2], "num_heads": [2], "window_size": 4},
    ),
    "ConvNextV2ForImageClassification": (
        "ConvNextV2Config",
        32,
        {"hidden_sizes": [8, 12, 16, 20], "depths": [1, 1, 1, 1]},
    ),
    "SegformerForSemanticSegmentation": (
        "SegformerConfig",
        32,
        {
            "depths": [1, 1], "num_encoder_blocks": 2, "hidden_sizes": [16, 24], "num_attention_heads": [1, 2],
            "decoder_hidden_size": 16, "sr_ratios": [2, 1], "mlp_ratios": [2, 2], "strides": [4, 2],
            "patch_sizes": [7, 3],
        },
    ),
    "MobileViTForImageClassification": (
        "MobileViTConfig",
        64,
        {"image_size": 64, "hidden_sizes": [24, 28, 32], "neck_hidden_sizes": [8, 8, 12, 16, 20, 24, 40]},
    ),
}  # fmt: skip
"""By class: its config's class, the side of its images, and what makes it small."""


def small(name: str) -> nn.Module:
    config, _, options = MODELS[name]
    model = getattr(transformers, name)(getattr(transformers, config)(num_labels=3, **options))
    return randomised(model)


@torch.no_grad()
def randomised(model: nn.Module) -> nn.Module:
    randomise_norms(model)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.add_(torch.rand_like(parameter) / 2)
    return model.double().eval()


def images(side: int) -> torch.Tensor:
    return torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("name", slow_but(("ViTForImageClassification", "BeitForImageClassification"), MODELS))
def test_slim_outputs_are_the_gated_models(name):
    seed = list(MODELS).index(name)
    torch.manual_seed(0)
    inputs = {"pixel_values": images(MODELS[name][1])}
    model = small(name)
    wanted = model(**inputs).logits
    model = autogate.prepare(model, inputs, flops=0.9)
    assert torch.equal(model(**inputs).logits, wanted)
    assert autogate.summary(model).reach >= 0.85
    kill(model, (0.3, 0.5, 0.7)[seed % 3], seed)
    settle_norms(model, ((), inputs))
    more = {"pixel_values": torch.cat([inputs["pixel_values"], inputs["pixel_values"][:1]])}
    gated, of_more = (rewriters.run_eval(model, (), given) for given in (inputs, more))
    assert spread(gated) > LEAST_SPREAD
    slim = autogate.finalize(model, warn=False)
    assert rewriters.relative_error(rewriters.run_eval(slim, (), inputs), gated) <= 1e-10
    assert rewriters.relative_error(rewriters.run_eval(slim, (), more), of_more) <= 1e-10
    assert type(slim(**inputs)) is type(model(**inputs))
    assert sum(parameter.numel() for parameter in slim.parameters()) < sum(
        parameter.numel() for parameter in small(name).parameters()
    )


def test_example_inputs_as_a_tensor_a_tuple_or_a_dict():
    image = images(16)
    maps = []
    for inputs in (image, (image,), {"pixel_values": image}):
        torch.manual_seed(0)
        maps.append(autogate.gates(autogate.prepare(small("ViTForImageClassification"), inputs)).channel_map)
    assert maps[0].difference(maps[1]) is maps[0].difference(maps[2]) is None


def test_detection_with_queries_and_a_backbone():
    torch.manual_seed(0)
    backbone = transformers.ResNetConfig(**RESNET, out_features=["stage4"])
    config = transformers.DetrConfig(
        use_timm_backbone=False, use_pretrained_backbone=False, backbone=None, backbone_config=backbone, d_model=16,
        encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=20, decoder_ffn_dim=20, num_queries=3, num_labels=3, init_std=0.5, init_xavier_std=2.0,
    )  # fmt: skip
    model, inputs = randomised(transformers.DetrForObjectDetection(config)), {"pixel_values": images(64)}
    model = autogate.prepare(model, inputs, flops=0.9)
    assert autogate.summary(model).reach >= 0.85
    kill(model, 0.5, 0)
    settle_norms(model, ((), inputs))
    gated = rewriters.run_eval(copy.deepcopy(model), (), inputs)
    assert spread(gated) > LEAST_SPREAD
    slim = autogate.finalize(model, warn=False)
    assert rewriters.relative_error(rewriters.run_eval(slim, (), inputs), gated) <= 1e-10
    assert slim(**inputs).pred_boxes.shape == (2, 3, 4)
