"""Finalized models that choose for each image, exported: they compute everything and multiply by zero."""

import onnxruntime
import pytest
import torch

import autogate
from autogate import adaptive
from benchmarks.adaptive_time import draw_codes, noise
from tests.autogate.saliency.nets import Branches, Tokens, lively
from tests.autogate.skipping.test_prototypes import Blocks, Stages


@pytest.mark.slow
@pytest.mark.parametrize(("make", "prototypes"), [(Branches, None), (Tokens, None), (Stages, 3), (Blocks, 3)])
def test_finalized_models_are_exported_masked(make, prototypes, tmp_path):
    """Both verbs compare the outputs with the finalized model's before they write a file."""
    images = noise(12, 16)
    model = adaptive.prepare(lively(make()), images, flops=0.9)
    draw_codes(model, images, 0.5)
    fast = adaptive.finalize(model, batches=[images], prototypes=prototypes, break_even=1, warn=False)
    assert autogate.to_torch_export(fast, tmp_path / "fast.pt2") < 1e-5
    assert autogate.to_onnx(fast, tmp_path / "fast.onnx") < 1e-5
    with torch.inference_mode():
        wanted = fast(images)
    exported = torch.export.load(tmp_path / "fast.pt2").module()
    session = onnxruntime.InferenceSession(str(tmp_path / "fast.onnx"))
    (name,) = (entry.name for entry in session.get_inputs())
    for found in (exported(images), torch.from_numpy(session.run(None, {name: images.numpy()})[0])):
        assert torch.allclose(found, wanted, atol=1e-5)
