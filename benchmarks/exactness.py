"""Exactness and reach for a list of timm models: with random classes dead, gated and slim outputs are equal.

    python -m benchmarks.exactness --out runs/exactness.jsonl [MODEL ...]

Each model is prepared, a random 10, 40 and 80 % of its gates are set to zero with three seeds each, and it is
finalized, in float64, on images of 96 x 96 pixels. One line per model has the largest relative difference between gated
and slim outputs, the smallest distance between the outputs of two samples, the share of FLOPs that gates reach, and the
FLOPs of the channel map relative to fvcore's count. Models that are already in the output file are skipped.
"""

from __future__ import annotations

import argparse
import copy
import logging
import warnings
from pathlib import Path

import timm
import torch
from fvcore.nn import FlopCountAnalysis
from torch import Tensor, nn

import autogate
import rewriters
from benchmarks.parts import kill, measure_missing, randomise_norms, settle_norms, spread

MODELS = [
    "resnet18", "resnet50", "resnext50_32x4d", "seresnet50", "resnest14d", "skresnet18", "vgg16_bn",
    "mobilenetv1_100", "mobilenetv2_100", "mobilenetv3_small_100", "efficientnet_b0", "tf_efficientnetv2_b0",
    "mixnet_s", "densenet121", "dla34", "dla60_res2next", "dpn68", "res2net50_26w_4s", "cspdarknet53",
    "cspresnet50", "vovnet39a", "ese_vovnet19b_dw", "hrnet_w18_small", "inception_v3", "inception_v4", "xception41",
    "nasnetalarge", "regnetx_002", "regnety_002", "repvgg_a0", "ghostnet_100", "hardcorenas_a", "rexnet_100",
    "selecsls42", "tresnet_m", "fasternet_t0", "mobileone_s0", "lcnet_050", "fbnetc_100", "hgnet_tiny",
]  # fmt: skip

SIDE = 96


def fvcore_flops(model: nn.Module, example: Tensor) -> float:
    """Multiply-adds of convolutions and linear layers for one sample, counted by fvcore."""
    for name in ("fvcore.nn.jit_analysis", "fvcore"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        counted = FlopCountAnalysis(model.eval(), example[:1]).by_operator()
    return counted["conv"] + counted["linear"]


def trial(
    model: nn.Module, analysis: rewriters.Analysis, example: Tensor, dead: float, seed: int
) -> tuple[float, float, float]:
    """(relative difference of outputs, their spread, FLOPs over fvcore's) for a random pattern. Uses the model up."""
    kill(model, dead, seed)
    settle_norms(model, ((example,), {}))
    bank = autogate.gates(model)
    wanted = rewriters.run_eval(model, (example,))
    plan = rewriters.plan(model, analysis, bank.live, (example,))
    bank.detach()
    rewriters.apply(model, plan, rewriters.UndoLog())
    difference = rewriters.relative_error(rewriters.run_eval(model, (example,)), wanted)
    return difference, spread(wanted), plan.flops(analysis.channel_map) / fvcore_flops(model, example)


def measure(name: str) -> dict:
    """Measure all patterns of one model."""
    torch.manual_seed(0)
    model = timm.create_model(name)
    randomise_norms(model)
    model, example = model.double(), torch.randn(2, 3, SIDE, SIDE).double()
    dense = fvcore_flops(model, example)
    analysis = rewriters.dry_run(model, rewriters.analyse(model, (example,)), (example,))
    model = autogate.prepare(model, example)
    summary = autogate.summary(model)
    patterns = [(dead, seed) for dead in (0.1, 0.4, 0.8) for seed in range(3)]
    results = [trial(copy.deepcopy(model), analysis, example, dead, seed) for dead, seed in patterns]
    return {
        "classes": len(autogate.gates(model).alpha),
        "reach": summary.reach,
        "worst_difference": max(difference for difference, _, _ in results),
        "least_spread": min(spread for _, spread, _ in results),
        "flops_over_fvcore_dense": summary.all_flops / dense,
        "flops_over_fvcore_slim": [min(ratio for *_, ratio in results), max(ratio for *_, ratio in results)],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=MODELS)
    parser.add_argument("--out", type=Path, default=Path("runs/exactness.jsonl"))
    args = parser.parse_args()
    measure_missing(args.out, args.models, measure)


if __name__ == "__main__":
    main()
