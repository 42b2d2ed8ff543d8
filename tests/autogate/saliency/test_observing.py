"""What images use, and thresholds that are calibrated to a budget."""

import pytest
import torch
from torch import nn

import autogate
from autogate import adaptive
from tests.autogate.saliency.nets import IMAGES, Branches, chain, choose, lively


@pytest.fixture
def model() -> nn.Module:
    found = adaptive.prepare(lively(Branches()), IMAGES, flops=0.9)
    choose(found)
    return found


def test_use_counts_channels_and_costs(model):
    found = adaptive.use(model, [IMAGES[:1], (IMAGES[1:], torch.tensor([0, 1]))])
    with torch.no_grad():
        model(IMAGES)
    dense = adaptive.bank(model).cost_of_images().dense
    assert torch.allclose(found.shares, adaptive.cost(model) / dense)
    for layer in found.layers:
        code = model.get_submodule(layer.path).saliency.open
        kinds = (~code.any(0)).sum(), (code.any(0) & ~code.all(0)).sum(), code.all(0).sum()
        assert (layer.never, layer.sometimes, layer.always) == tuple(map(int, kinds))
        assert layer.mean == pytest.approx(float(code.float().mean()))
    assert sum(layer.sometimes for layer in found.layers) > 0
    assert "sometimes" in str(found) and "FLOPs of 3 images" in str(found)


@pytest.mark.parametrize("flops", [0.2, 0.4, 0.8])
def test_a_budget_is_met_without_training(model, flops):
    images = torch.randn(40, 3, 16, 16)
    share = adaptive.budget(model.train(), flops=flops, batches=[images[:20], images[20:]])
    assert share == pytest.approx(flops, abs=0.01)
    assert float(adaptive.use(model, [images]).shares.mean()) == pytest.approx(share)
    assert model.training


def test_a_generator_of_batches_is_kept(model):
    assert adaptive.budget(model, flops=0.4, batches=(x for x in [IMAGES, IMAGES])) == pytest.approx(0.4, abs=0.05)


@pytest.mark.parametrize(
    ("flops", "batches", "message"),
    [(1e-4, [IMAGES], "every image takes"), (1.2, [IMAGES], r"\(0, 1\)"), (0.5, [], "yields none")],
)
def test_a_budget_that_cannot_be_met_leaves_the_threshold(model, flops, batches, message):
    before = float(adaptive.bank(model).threshold)
    with pytest.raises(autogate.AutogateError, match=message):
        adaptive.budget(model, flops=flops, batches=batches)
    assert float(adaptive.bank(model).threshold) == before == float(model.stem[0].saliency.threshold)


def test_use_needs_batches(model):
    with pytest.raises(autogate.AutogateError, match="yields none"):
        adaptive.use(model, [])
    with pytest.raises(autogate.AutogateError, match="no saliency modules"):
        adaptive.use(chain(), [IMAGES])
