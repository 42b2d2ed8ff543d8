"""Models whose norms take cross-channel statistics: reach of gates if embeddings stay, and if they can shrink.

    python -m benchmarks.norms --out runs/norms.jsonl [MODEL ...]

For `embed=False` and `embed=True`: the share of FLOPs with a gate on the input or output side, and the share left with
a random half of the classes dead (mean of three seeds). For `embed=True` also the largest relative difference between
gated and slim outputs, with 30, 50 and 70 % dead and three seeds. Norms' statistics and vectors are random. Models that
are already in the output file are skipped.
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

import autogate
import rewriters
from benchmarks.parts import (
    measure_missing,
    randomise_norms,
    randomise_vectors,
    share_left,
    worst_difference,
)

MODELS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "convnext_atto": ("convnext_atto", 64, {}),
    "convnext_atto, 1x1 convolutions": ("convnext_atto", 64, {"conv_mlp": True}),
    "convnextv2_atto": ("convnextv2_atto", 64, {}),
    "vit_tiny": ("vit_tiny_patch16_224", 112, {"img_size": 112}),
    "vit_tiny, RMSNorm": ("vit_tiny_patch16_224", 112, {"img_size": 112, "norm_layer": "rmsnorm"}),
    "deit_tiny_distilled": ("deit_tiny_distilled_patch16_224", 112, {"img_size": 112}),
    "swin_tiny, 5 blocks": ("swin_tiny_patch4_window7_224", 112, {"img_size": 112, "depths": (1, 1, 2, 1)}),
    "resnet50_gn": ("resnet50_gn", 64, {}),
    "edgenext_xx_small": ("edgenext_xx_small", 64, {}),
    "mobilevit_xxs": ("mobilevit_xxs", 64, {}),
    "poolformer_s12": ("poolformer_s12", 64, {}),
    "mixer_s32": ("mixer_s32_224", 224, {}),
    "coatnet_nano_rw": ("coatnet_nano_rw_224", 224, {}),
    "maxvit_tiny, 4 blocks": ("maxvit_tiny_tf_224", 224, {"depths": (1, 1, 1, 1)}),
    "resnetv2_50d_evos": ("resnetv2_50d_evos", 64, {}),
    "resnetv2_50d_frn": ("resnetv2_50d_frn", 64, {}),
}
"""By name in the table: the timm model, the side of its images and the options to build it with."""

DOUBLE = {"resnetv2_50d_frn"}
"""Models computed in float64: with random weights, float32's rounding alone amounts to 1e-5."""


@torch.no_grad()
def build(name: str) -> tuple[nn.Module, Tensor]:
    """The model with random norms and a random classifier (a Mixer's is zero), and an example."""
    torch.manual_seed(0)
    timm_name, side, options = MODELS[name]
    model, example = timm.create_model(timm_name, num_classes=10, **options), torch.randn(2, 3, side, side)
    randomise_norms(model)
    randomise_vectors(model)
    for module in model.modules():
        if isinstance(module, nn.Linear) and module.out_features == 10:
            module.weight.normal_(std=0.05)
    return (model.double(), example.double()) if name in DOUBLE else (model, example)


def reach(name: str, embed: bool) -> tuple[float, float]:
    """(share of FLOPs that gates reach, share left with half of the classes dead)."""
    model, example = build(name)
    try:
        model = autogate.prepare(model, example, flops=0.99, embed=embed)
    except rewriters.AutogateError:  # no channel can be removed
        return 0.0, 1.0
    return autogate.summary(model).reach, share_left(model)


def measure(name: str) -> dict[str, Any]:
    pinned, free = reach(name, embed=False), reach(name, embed=True)
    model, example = build(name)
    model = autogate.prepare(model, example, flops=0.99)
    draws = itertools.product((0.3, 0.5, 0.7), range(3))
    return {"pinned": pinned, "free": free, "worst_difference": worst_difference(model, ((example,), {}), draws)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=list(MODELS))
    parser.add_argument("--out", type=Path, default=Path("runs/norms.jsonl"))
    args = parser.parse_args()
    measure_missing(args.out, args.models, measure)


if __name__ == "__main__":
    main()
