"""Fixtures of the tests of files."""

from pathlib import Path

import pytest
import timm
import torch

import autogate


@pytest.fixture(scope="module")
def slim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with a small slim model of timm's."""
    torch.manual_seed(0)
    model = autogate.prepare(timm.create_model("test_resnet", num_classes=10), torch.randn(2, 3, 64, 64), flops=1.0)
    with torch.no_grad():
        autogate.gates(model).alpha[::3] = 0
    path = tmp_path_factory.mktemp("slim") / "slim.safetensors"
    autogate.save(autogate.finalize(model, warn=False).eval(), path)
    return path
