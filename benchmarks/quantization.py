"""Slim models in eight bits: file sizes, and the effect of rounding on the outputs.

    python -m benchmarks.quantization

Every other class of channels is removed from each model (random weights and norms' statistics). Then it is quantized in
the two ways of docs/quantization.md. Errors are those of the outputs for random images that were not used to set the
scales. Needs torchao (`pip install -e ".[test]"`).
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from pathlib import Path

import timm
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import (
    X86InductorQuantizer,
    get_default_x86_inductor_quantization_config,
)

import autogate

MODELS = ["resnet18", "mobilenetv2_100", "vit_tiny_patch16_224"]


def slimmed(name: str, example: Tensor) -> nn.Module:
    """A timm model with half of its channels."""
    model = timm.create_model(name, num_classes=100)
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.normal_(module.running_mean, std=0.1)
    model = autogate.prepare(model, example)
    with torch.no_grad():
        autogate.gates(model).alpha[::2] = 0
    return autogate.finalize(model, warn=False).eval()


def dynamic(slim: nn.Module) -> nn.Module:
    """Linear layers in eight bits, with inputs quantized dynamically."""
    quantized = copy.deepcopy(slim)
    quantize_(quantized, Int8DynamicActivationInt8WeightConfig())
    return quantized


def static(slim: nn.Module, batches: list[Tensor]) -> nn.Module:
    """Convolutions and linear layers in eight bits, with scales calibrated on some batches."""
    program = torch.export.export(slim, (batches[0],)).module()
    quantizer = X86InductorQuantizer().set_global(get_default_x86_inductor_quantization_config())
    prepared = prepare_pt2e(program, quantizer)
    for batch in batches:
        prepared(batch)
    return without_unread(convert_pt2e(prepared))


def without_unread(program: nn.Module) -> nn.Module:
    """Delete the float kernels that the conversion leaves behind."""
    read = {node.target for node in program.graph.nodes if node.op == "get_attr"}
    for name in [name for name, _ in (*program.named_parameters(), *program.named_buffers()) if name not in read]:
        owner, _, attribute = name.rpartition(".")
        delattr(program.get_submodule(owner), attribute)
    return program


def size(model: nn.Module) -> float:
    """Size of its state_dict on disk, in megabytes."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.pt"
        torch.save(model.state_dict(), path)
        return path.stat().st_size / 1e6


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=MODELS)
    parser.add_argument("--side", type=int, default=224)
    args = parser.parse_args()
    torch.manual_seed(0)
    for name in args.models:
        calibration, images = (torch.randn(8, 3, args.side, args.side) for _ in range(2))
        dense = size(timm.create_model(name, num_classes=100))
        slim = slimmed(name, images[:2])
        wanted = slim(images)
        told = [f"{name}: dense {dense:.2f} MB, slim {size(slim):.2f} MB"]
        for kind, quantized in (("dynamic", dynamic(slim)), ("static", static(slim, [calibration]))):
            error = float((quantized(images) - wanted).norm() / wanted.norm())
            told.append(f"{kind} int8 {size(quantized):.2f} MB, outputs {error:.1%} off")
        print("; ".join(told), flush=True)


if __name__ == "__main__":
    main()
