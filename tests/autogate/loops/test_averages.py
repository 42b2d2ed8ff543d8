"""Averages of a model's weights: torch's and timm's."""

import pytest
import timm
import torch
from timm.utils import ModelEmaV2, ModelEmaV3
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import autogate
from tests.autogate.loops.training import assert_exact, net, output, train
from tests.slow import slow_but

AVERAGES = {
    "AveragedModel": AveragedModel,
    "AveragedModel by EMA": lambda model: AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9)),
    "AveragedModel with buffers": lambda model: AveragedModel(model, use_buffers=True),
    "AveragedModel by EMA with buffers": lambda model: AveragedModel(
        model, use_buffers=True, multi_avg_fn=get_ema_multi_avg_fn(0.9)
    ),
    "ModelEmaV2": lambda model: ModelEmaV2(model, decay=0.9),
    "ModelEmaV3": lambda model: ModelEmaV3(model, decay=0.9),
    "ModelEmaV3, slow": lambda model: ModelEmaV3(model, decay=0.98),
}


QUICK = ("AveragedModel", "AveragedModel by EMA with buffers", "ModelEmaV3")


@pytest.mark.parametrize("name", slow_but(QUICK, AVERAGES))
def test_what_is_dead_in_the_model_is_dead_in_its_average(name):
    model, example = net(flops=0.5, steps=60)
    average = AVERAGES[name](model)
    update = getattr(average, "update_parameters", None) or average.update
    train(model, 60, lambda: update(model))
    bank, theirs = autogate.gates(model), autogate.gates(average.module)
    assert (~bank.live).any()
    assert torch.equal(theirs.live, bank.live)
    output(average.module, example)
    for side in theirs.channel_map.gated:
        weight = average.module.get_parameter(side.tensor)
        dead = torch.cat([~bank.live, torch.zeros(1, dtype=torch.bool)])[theirs.channel_map.classes[side]]
        assert weight.index_select(side.dim, dead.nonzero().flatten()).abs().sum() == 0
    assert_exact(average.module, example)
    assert_exact(model, example)


@pytest.mark.parametrize("name", slow_but(QUICK, AVERAGES))
def test_an_average_computes_with_the_averaged_kernels(name):
    """Averages of alpha, epsilon and gates don't fit each other; the kernels are averaged, and not to be scaled."""
    model, example = net(flops=0.5, steps=40)
    average = AVERAGES[name](model)
    update = getattr(average, "update_parameters", None) or average.update
    train(model, 50, lambda: update(model))
    bank, state = autogate.gates(model), {key: value.clone() for key, value in average.module.state_dict().items()}
    assert (~bank.live).any()
    plain = timm.create_model("test_resnet", num_classes=4)
    plain.load_state_dict({key: value for key, value in state.items() if not key.startswith("autogate.")})
    with torch.no_grad():
        for side in bank.channel_map.gated:
            dead = torch.cat([~bank.live, torch.zeros(1, dtype=torch.bool)])[bank.channel_map.classes[side]]
            plain.get_parameter(side.tensor).index_fill_(side.dim, dead.nonzero().flatten(), 0)
    loaded, _ = net(flops=0.5, steps=40)
    loaded.load_state_dict(state)
    for averaged in (average.module, loaded):
        torch.testing.assert_close(output(averaged, example), output(plain, example), rtol=1e-5, atol=1e-6)
