"""Slim models of more than twenty families: exported, read back, run, compiled, and compared.

    python -m benchmarks.export --out runs/export.jsonl [--backend inductor] [MODEL ...]

Each model is prepared, a random half of its classes dies, and it is finalized. The slim model is written as a
torch.export program and as an ONNX file, each of which is read back and compared on batches of two and of three
samples; and it is compiled as one graph. One line per model has the largest relative difference of each, or what went
wrong, and how much float32 alone rounds (the slim model's outputs compared with its outputs in float64). Models that
are already in the output file are skipped.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

import autogate
import rewriters
from autogate.files.exporting import inputs_of, to_onnx, to_torch_export
from benchmarks.parts import kill, measure_missing, randomise_norms, settle_norms

_SMALL: dict[str, Any] = {"img_size": 64, "depth": 2, "embed_dim": 96, "num_heads": 6}
_SHORT: dict[str, Any] = {"layers": (1, 1, 1, 1)}

MODELS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "resnet": ("resnet18", 64, {}),
    "resnext": ("resnext50_32x4d", 64, _SHORT),
    "res2net": ("res2net50_26w_4s", 64, _SHORT),
    "resnest": ("resnest14d", 64, {}),
    "regnet": ("regnety_002", 64, {}),
    "densenet": ("densenet121", 64, {"block_config": (2, 2, 2, 2)}),
    "dla": ("dla34", 64, {}),
    "cspnet": ("cspresnet50", 64, {}),
    "vovnet": ("ese_vovnet19b_dw", 64, {}),
    "repvgg": ("repvgg_a0", 64, {}),
    "mobilenetv3": ("mobilenetv3_small_050", 64, {}),
    "efficientnet": ("test_efficientnet", 64, {}),
    "ghostnet": ("ghostnet_100", 64, {}),
    "convnext": ("test_convnext", 64, {}),
    "mambaout": ("test_mambaout", 64, {}),
    "vit": ("vit_tiny_patch16_224", 64, {"img_size": 64, "depth": 2}),
    "deit": ("deit_tiny_distilled_patch16_224", 64, {"img_size": 64, "depth": 2}),
    "eva": ("vit_small_patch16_rope_224", 64, _SMALL),
    "beit": ("beit_base_patch16_224", 64, _SMALL),
    "swin": (
        "swin_tiny_patch4_window7_224", 56, {"img_size": 56, "depths": (1, 2), "num_heads": (2, 4), "embed_dim": 32}
    ),
    "maxvit": ("maxvit_pico_rw_256", 64, {"img_size": 64, "depths": (1, 1), "embed_dim": (32, 64)}),
    "xcit": ("xcit_nano_12_p16_224", 64, {"img_size": 64, "depth": 2}),
    "pvt": ("pvt_v2_b0", 64, {"depths": (1, 1, 1, 1)}),
    "levit": ("levit_128s", 224, {}),
    "fastvit": ("fastvit_sa12", 64, _SHORT),
    "mobilevit": ("mobilevit_xxs", 64, {}),
}  # fmt: skip
"""By family: the timm model, the side of its images and the options to build it with."""


def slim_model(name: str) -> nn.Module:
    """The slim model, after a random half of its classes died."""
    torch.manual_seed(0)
    timm_name, side, options = MODELS[name]
    model = timm.create_model(timm_name, num_classes=10, **options)
    randomise_norms(model)
    example = torch.randn(2, 3, side, side)
    model = autogate.prepare(model, example, flops=0.99)
    kill(model, 0.5)
    settle_norms(model, ((example,), {}))
    return autogate.finalize(model, warn=False).eval()


def compiled(model: nn.Module, side: int, backend: str) -> float:
    """Largest relative difference between the outputs of the model and of the model compiled as one graph."""
    example = torch.randn(2, 3, side, side)
    wanted = rewriters.run_eval(model, (example,))
    torch.compiler.reset()
    run = torch.compile(model, backend=backend, fullgraph=True)
    with torch.no_grad():
        got = run(example)
    return rewriters.relative_error([got] if isinstance(got, Tensor) else list(got), wanted)


def rounding(model: nn.Module) -> float:
    """Relative difference between a model's outputs in float32 and in float64, the largest over several samples."""
    args, kwargs = inputs_of(model, 16)
    in_double = tree_map_only(Tensor, Tensor.double, (args, kwargs))
    wanted = rewriters.run_eval(copy.deepcopy(model).double(), *in_double)
    return rewriters.relative_error(rewriters.run_eval(model, args, kwargs), wanted)


def _tried(step: Callable[[], float]) -> float | str:
    try:
        return step()
    except Exception as error:  # the result is whatever the backend raises
        return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def measure(name: str, backend: str) -> dict[str, Any]:
    model = slim_model(name)
    with tempfile.TemporaryDirectory() as folder:
        return {
            "rewritten": sum("forward" in vars(module) for module in model.modules()),
            "torch.export": _tried(lambda: to_torch_export(model, Path(folder) / "slim.pt2")),
            "onnx": _tried(lambda: to_onnx(model, Path(folder) / "slim.onnx")),
            "rounding": rounding(model),
            f"compile ({backend})": _tried(lambda: compiled(model, MODELS[name][1], backend)),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=list(MODELS))
    parser.add_argument("--out", type=Path, default=Path("runs/export.jsonl"))
    parser.add_argument("--backend", default="inductor", help="backend of torch.compile")
    args = parser.parse_args()
    measure_missing(args.out, args.models, partial(measure, backend=args.backend))


if __name__ == "__main__":
    main()
