"""A choice of channels for each image is compared with its two variants, each of which changes one thing."""

from __future__ import annotations

import pytest
import torch

import autogate
from benchmarks.accuracy.adaptive import ADAPTIVE, FixedKModule, StaticModule, become, fit_k, mean_cost, set_k
from benchmarks.accuracy.blocks import share_left
from benchmarks.accuracy.methods import count_flops
from benchmarks.accuracy.models import MCifarNet, ResNet
from tests.benchmarks.tasks import tried

IMAGES = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def scoring(kind):
    """A model whose modules are of a kind, and score each image differently if they look at it."""
    torch.manual_seed(0)
    method = autogate.adaptive.SANP(sharpness=1.0)
    model = autogate.adaptive.prepare(ResNet(8), IMAGES[:2], flops=0.5, method=method).eval()
    become(model, kind)
    for module in autogate.adaptive.bank(model).saliency_modules:
        torch.nn.init.normal_(module.reduce.weight)
        torch.nn.init.normal_(module.expand.weight)
    return model


def test_the_backbone_of_the_paper_costs_what_its_table_says():
    assert count_flops(MCifarNet(), IMAGES[:1]) == pytest.approx(174.3e6, rel=1e-4)


@pytest.mark.parametrize("training", [False, True])
def test_fixed_k_computes_as_many_channels_of_each_layer_for_every_image(training):
    model = scoring(FixedKModule)
    set_k(model, 0.5)
    model.train(training)(IMAGES)
    opened = [module.open for module in autogate.adaptive.bank(model).saliency_modules]
    assert all((open.float().mean(1) == 0.5).all() for open in opened)
    assert any((open != open[0]).any() for open in opened)  # not the same ones


def test_fixed_k_meets_the_budget():
    model = scoring(FixedKModule)
    fit_k(model, 0.4, [IMAGES])
    assert 0.35 < mean_cost(model, [IMAGES]) <= 0.4


def test_static_computes_the_same_channels_for_every_image():
    model = scoring(StaticModule)
    wanted = model(IMAGES)
    opened = [module.open for module in autogate.adaptive.bank(model).saliency_modules]
    assert all((open == open[0]).all() for open in opened) and not all(open.all() for open in opened)
    for module in autogate.adaptive.bank(model).saliency_modules:
        module.settle()
    torch.testing.assert_close(model(IMAGES), wanted, rtol=1e-3, atol=1e-3)
    slim = autogate.adaptive.finalize(model, batches=[IMAGES], break_even=0.0, warn=False)
    torch.testing.assert_close(slim(IMAGES), wanted, rtol=1e-3, atol=1e-3)
    assert slim.blocks[0].conv1.out_channels < 16


@pytest.mark.slow
@pytest.mark.parametrize("method", ADAPTIVE)
def test_every_method_trains_for_the_same_epochs_and_its_cost_is_that_of_the_test_images(method):
    run = tried()
    task = run.task(0.5)
    whole = count_flops(run.model, task.example)
    slim = ADAPTIVE[method](run.model, task)
    left = share_left(slim, whole, task.example, run.data, run.setting)
    slim.eval()(run.setting.ready(run.data.inputs))
    assert sum(run.epochs) == 4
    assert left == pytest.approx(float(autogate.adaptive.cost(slim).mean()) / whole)
    assert method != "autogate.adaptive, fixed K" or 0.42 < left < 0.52
