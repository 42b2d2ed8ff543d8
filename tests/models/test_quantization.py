"""Slim models in eight bits, as in docs/quantization.md."""

import pytest
import timm
import torch

from autogate.demo import MODEL

pytest.importorskip("torchao", reason="torchao is not installed")

from benchmarks import quantization
from tests.slow import slow_but

MODELS = [MODEL, "test_vit", "test_efficientnet"]
CHANGED = {"dynamic": 0.08, "static": 0.15}
"""What rounding to eight bits may change of the outputs' size; another forward changes all of it."""


def in_eight_bits(model: torch.nn.Module, kind: str) -> set[tuple[int, ...]]:
    """Shapes of the kernels that are kept in eight bits."""
    state = model.state_dict().values()
    return {tuple(value.shape) for value in state if value.ndim > 1 and (
        value.dtype == torch.int8 if kind == "static" else type(value) is not torch.Tensor)}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", CHANGED)
@pytest.mark.parametrize("name", slow_but([MODEL], MODELS))
def test_a_slim_model_is_quantized_like_any_other(name, kind):
    torch.manual_seed(0)
    side = timm.get_pretrained_cfg(name).input_size[-1]
    calibration, images = (torch.randn(4, 3, side, side) for _ in range(2))
    slim = quantization.slimmed(name, images[:2])
    quantized = quantization.dynamic(slim) if kind == "dynamic" else quantization.static(slim, [calibration])
    with torch.no_grad():
        wanted, got = slim(images), quantized(images)
    assert 0 < (got - wanted).norm() / wanted.norm() < CHANGED[kind]
    kinds = torch.nn.Linear if kind == "dynamic" else (torch.nn.Linear, torch.nn.Conv2d)
    kernels = {tuple(module.weight.shape) for module in slim.modules() if isinstance(module, kinds)}
    assert in_eight_bits(quantized, kind) == kernels
    assert kind == "dynamic" or quantization.size(quantized) < 0.5 * quantization.size(slim)
