"""Forms of attention: reach of gates, FLOPs left with half of the classes dead, exactness of slim outputs.

    python -m benchmarks.attention --out runs/attention.jsonl [MODEL ...]

Measured as in `benchmarks/norms.py`, with embeddings that can shrink: the share of FLOPs with a gate on the input or
output side; the share left with a random half of the classes dead (mean of three seeds); the largest relative
difference between gated and slim outputs with 30, 50 and 70 % dead. The models are timm's with fewer blocks, computed
in float64. Models that are already in the output file are skipped.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

import autogate
from benchmarks.parts import measure_missing, randomise_norms, share_left, worst_difference

_SMALL: dict[str, Any] = {"img_size": 64, "depth": 2, "embed_dim": 96, "num_heads": 6}

MODELS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "vit": ("vit_tiny_patch16_224", 64, {"img_size": 64, "depth": 2}),
    "vit, norms of q and k": ("vit_tiny_patch16_224", 64, {"img_size": 64, "depth": 2, "qk_norm": True}),
    "deit, distilled": ("deit_tiny_distilled_patch16_224", 64, {"img_size": 64, "depth": 2}),
    "vit, relative positions": ("vit_relpos_small_patch16_224", 64, _SMALL),
    "vit, attention pooling": ("vit_so150m_patch16_reg4_map_256", 64, _SMALL),
    "vit, rotary": ("vit_small_patch16_rope_224", 64, _SMALL),
    "dinov3, rotary by halves": ("vit_small_patch16_dinov3", 64, _SMALL),
    "eva02, rotary, SwiGLU": ("eva02_tiny_patch14_224", 56, {"img_size": 56, "depth": 2}),
    "beit": ("beit_base_patch16_224", 64, _SMALL),
    "cait, talking heads": ("cait_xxs24_224", 64, {"img_size": 64, "depth": 2}),
    "xcit": ("xcit_nano_12_p16_224", 64, {"img_size": 64, "depth": 2}),
    "naflex": ("naflexvit_base_patch16_gap", 64, {"depth": 2, "embed_dim": 96, "num_heads": 6}),
    "swin": (
        "swin_tiny_patch4_window7_224", 56, {"img_size": 56, "depths": (1, 2), "num_heads": (2, 4), "embed_dim": 32}
    ),
    "swinv2": (
        "swinv2_tiny_window8_256", 64, {"img_size": 64, "depths": (1, 2), "num_heads": (2, 4), "embed_dim": 32}
    ),
    "maxvit": ("maxvit_pico_rw_256", 64, {"img_size": 64, "depths": (1, 1), "embed_dim": (32, 64)}),
    "coatnet": ("coatnet_pico_rw_224", 64, {"img_size": 64, "depths": (1, 1, 1, 1)}),
    "edgenext": ("edgenext_xx_small", 64, {}),
    "levit": ("levit_128s", 224, {}),
    "efficientformer": ("efficientformer_l1", 224, {"depths": (1, 1, 1, 2)}),
    "efficientformerv2": ("efficientformerv2_s0", 224, {"depths": (1, 1, 2, 2)}),
    "efficientvit, linear attention": ("efficientvit_b0", 64, {}),
    "fastvit": ("fastvit_sa12", 64, {"layers": (1, 1, 1, 1)}),
    "pvt": ("pvt_v2_b0", 64, {"depths": (1, 1, 1, 1)}),
    "twins": ("twins_pcpvt_small", 224, {"img_size": 64, "depths": (1, 1, 1, 1)}),
    "mobilevit": ("mobilevit_xxs", 64, {}),
    "mobilevitv2, linear attention": ("mobilevitv2_050", 64, {}),
    "mobilenetv4, shared keys": ("mobilenetv4_hybrid_medium", 64, {}),
}  # fmt: skip
"""By name in the table: the timm model, the side of its images and the options to build it with."""


@torch.no_grad()
def build(name: str) -> tuple[nn.Module, Tensor]:
    """The model, with vectors and classifier unlike their initialisation, and an example, in float64."""
    torch.manual_seed(0)
    timm_name, side, options = MODELS[name]
    model, example = timm.create_model(timm_name, num_classes=10, **options), torch.randn(2, 3, side, side)
    randomise_norms(model)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.add_(torch.rand_like(parameter) * 0.4)
        elif len(parameter) == 10:
            parameter.normal_(std=0.05)
    return model.double(), example.double()


def measure(name: str) -> dict[str, Any]:
    model, example = build(name)
    model = autogate.prepare(model, example, flops=0.99)
    draws = ((0.3, 0), (0.5, 1), (0.7, 2))
    return {
        "reach": autogate.summary(model).reach,
        "left": share_left(model),
        "worst_difference": worst_difference(model, ((example,), {}), draws),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=list(MODELS))
    parser.add_argument("--out", type=Path, default=Path("runs/attention.jsonl"))
    args = parser.parse_args()
    measure_missing(args.out, args.models, measure)


if __name__ == "__main__":
    main()
