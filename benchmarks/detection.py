"""Ultralytics' networks: reach of gates, FLOPs left with half of the classes dead, exactness of slim outputs.

    pip install ultralytics
    python -m benchmarks.detection [--out runs/detection.jsonl] [MODEL ...]

Measured as in `benchmarks/attention.py`: the share of FLOPs with a gate on the input or output side; the share left
with a random half of the classes dead (mean of three seeds); the largest relative difference between gated and slim
outputs with 30, 50 and 70 % dead, in float64. In between the models run at other sizes and in train mode, as in a
trainer: heads keep the anchors of the size that they saw last. Models that are already in the output file are skipped.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

import autogate
from benchmarks.parts import measure_missing, randomise_norms, share_left, worst_difference

MODELS = (
    "yolov5n", "yolov6n", "yolov8n", "yolov8n-seg", "yolov8n-pose", "yolov8n-cls", "yolov9t", "yolov10n", "yolo11n",
    "yolo11n-obb", "yolo12n", "yolo26n", "yolo26n-seg", "yolov8-rtdetr", "rtdetr-resnet50",
)  # fmt: skip


def build(name: str) -> nn.Module:
    """The network with random weights, and with norms unlike their initialisation."""
    from ultralytics import RTDETR, YOLO

    torch.manual_seed(0)
    model = (RTDETR if "rtdetr" in name else YOLO)(f"{name}.yaml").model
    randomise_norms(model)
    return model


def measure(name: str) -> dict[str, Any]:
    model, example = build(name), torch.rand(2, 3, 128, 128)
    started = time.time()
    model = autogate.prepare(model, example, flops=0.99)
    took = time.time() - started
    with torch.no_grad():
        model.train()(torch.rand(2, 3, 64, 96))
        model.eval()(torch.rand(1, 3, 96, 160))
    draws = ((0.3, 0), (0.5, 1), (0.7, 2))
    return {
        "reach": autogate.summary(model).reach,
        "left": share_left(model),
        "difference": worst_difference(model.double(), ((example.double(),), {}), draws),
        "prepare_s": round(took, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=list(MODELS))
    parser.add_argument("--out", type=Path, default=Path("runs/detection.jsonl"))
    args = parser.parse_args()
    measure_missing(args.out, args.models, measure)


if __name__ == "__main__":
    main()
