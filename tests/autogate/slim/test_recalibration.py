"""Recalibration measures running statistics on the data and changes nothing else."""

import pytest
import torch
from torch import nn

import autogate
from autogate import AutogateError


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Dropout(0.5), nn.ReLU(), nn.Conv2d(8, 4, 3))


def batches(count: int = 4, size: int = 16) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [(2 + torch.randn(size, 3, 8, 8, generator=generator), torch.zeros(size)) for _ in range(count)]


def statistics(model: nn.Module, data) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and variance of what the norm sees, over all of the data at once."""
    seen = model[0](torch.cat([images for images, _ in data]))
    return seen.mean((0, 2, 3)), seen.var((0, 2, 3), unbiased=False)


@pytest.mark.parametrize("gated", [False, True])
def test_statistics_become_those_of_the_data(gated):
    model = net()
    if gated:
        autogate.prepare(model, batches()[0][0])
        with torch.no_grad():
            autogate.gates(model).alpha[:2] = 0
    model.train()
    weights = {name: value.clone() for name, value in model.named_parameters()}
    buffers = model[1].running_mean.data_ptr(), model[1].num_batches_tracked.clone()
    assert autogate.recalibrate(model, batches()) is model
    with torch.no_grad():
        mean, variance = statistics(model, batches())
    torch.testing.assert_close(model[1].running_mean, mean)
    torch.testing.assert_close(model[1].running_var, variance, rtol=1e-3, atol=1e-4)
    assert (model[1].running_mean.data_ptr(), model[1].num_batches_tracked) == buffers
    assert all(torch.equal(value, weights[name]) for name, value in model.named_parameters())
    assert all(module.training for module in model.modules()) and model[1].momentum == 0.1


def test_a_generator_a_mapping_and_bare_tensors_will_do():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = net()

        def forward(self, pixels):
            return self.body(pixels)

    wanted = autogate.recalibrate(net(), batches())[1].running_mean
    given = autogate.recalibrate(net(), (images for images, _ in batches()), batches=4)[1].running_mean
    assert torch.equal(given, wanted)
    named = autogate.recalibrate(Named(), [{"pixels": images} for images, _ in batches()]).body[1].running_mean
    assert torch.equal(named, wanted)


def test_only_so_many_batches_are_taken():
    some = autogate.recalibrate(net(), batches(4), batches=2)[1].running_mean
    assert torch.equal(some, autogate.recalibrate(net(), batches(2))[1].running_mean)


@pytest.mark.parametrize("loader", [[], iter([])])
def test_a_loader_without_batches_is_refused_and_changes_nothing(loader):
    model = net()
    with pytest.raises(AutogateError, match="can't be recalibrated"):
        autogate.recalibrate(model, loader)
    assert not model[1].running_mean.any() and not model[1]._forward_pre_hooks


def test_a_norm_that_runs_twice_is_refused_and_left_alone():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm2d(3)

        def forward(self, x):
            return self.norm(self.norm(x))

    model = Twice()
    model.weight = nn.Parameter(torch.zeros(1))
    with pytest.raises(AutogateError, match="reused"):
        autogate.recalibrate(model, batches())
    assert not model.norm.running_mean.any() and model.norm.momentum == 0.1


def test_a_model_without_batch_norms_stays_as_it_is():
    model = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))
    assert autogate.recalibrate(model, []) is model


def test_a_norm_that_runs_in_train_mode_only_keeps_its_statistics():
    """fvcore estimates zeros for it."""

    class WithAuxiliaryHead(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm, self.auxiliary = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.BatchNorm2d(8)

        def forward(self, x):
            x = self.norm(self.conv(x))
            return (x, self.auxiliary(x)) if self.training else x

    model = autogate.recalibrate(WithAuxiliaryHead(), batches())
    assert (model.auxiliary.running_var == 1).all() and (model.auxiliary.running_mean == 0).all()
    assert (model.norm.running_var != 1).all()
