"""`autogate.adaptive` as a user calls it."""

import pytest
import timm
import torch
from torch import nn

import autogate
from autogate import adaptive, demo, digits
from tests.autogate.saliency.nets import IMAGES, chain, choose


def test_models_without_modules_have_no_cost():
    with pytest.raises(autogate.AutogateError, match="no saliency modules"):
        adaptive.cost(chain())


def test_other_verbs_refuse_a_model_that_chooses():
    model = adaptive.prepare(chain(), IMAGES, flops=0.9)
    for verb in (autogate.prepare, autogate.gates):
        with pytest.raises(autogate.AutogateError, match="chooses its channels for each image"):
            verb(model)


def test_a_choice_is_exported_masked(tmp_path):
    model = adaptive.prepare(chain().eval(), IMAGES, flops=0.9)
    choose(model)
    exported = torch.export.export(model, (IMAGES,)).module()
    assert torch.allclose(exported(IMAGES), model(IMAGES), atol=1e-5)


def test_everything_off_and_everything_on():
    model = adaptive.prepare(chain().eval(), IMAGES, flops=0.9)
    dense = model(IMAGES)
    for bias, same in ((-2.0, False), (0.0, True)):
        for module in model.modules():
            if hasattr(module, "saliency"):
                nn.init.constant_(module.saliency.expand.bias, bias)
        out = model(IMAGES)
        assert out.isfinite().all()
        assert torch.equal(out, dense) is same


@pytest.mark.slow
@pytest.mark.parametrize("flops", [0.5, 0.35])
def test_the_mean_cost_meets_the_budget_on_digits(flops):
    torch.manual_seed(0)
    train, test = (
        digits.Split(nn.functional.avg_pool2d(split.images, 2), split.labels) for split in digits.load(seed=0)
    )
    model = timm.create_model("test_resnet", num_classes=10, in_chans=1)
    demo.fit(model, train, 6, 0.05)
    dense = demo.accuracy(demo.logits(model, test.images), test.labels)
    adaptive.prepare(model, train.images[:2], flops=flops, steps=demo.steps_in(14, train))
    demo.fit(model, train, 14, 0.05)
    logits, bank = demo.logits(model, test.images), model.autogate_saliency
    model(test.images)
    share = float(adaptive.cost(model).mean()) / bank.cost_of_images().dense
    assert share == pytest.approx(flops, abs=0.01)
    assert demo.accuracy(logits, test.labels) > dense - 2
