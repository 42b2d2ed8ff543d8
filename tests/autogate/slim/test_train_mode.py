"""finalize compares in train mode too, and names the module that first computes something else."""

import copy

import pytest
import torch
from torch import nn

import autogate


class Factor(nn.Module):
    """Multiplies by a number made of its width: in eval mode, or in train mode only."""

    def __init__(self, training):
        super().__init__()
        self.layer, self.only = nn.Conv2d(3, 8, 3), training

    def forward(self, x):
        y = self.layer(x)
        return y * y.shape[1] ** -0.5 if self.training is self.only else y


def closed(training):
    torch.manual_seed(0)
    model = nn.Sequential(Factor(training), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 2, 3))
    model = autogate.prepare(model, torch.randn(2, 3, 8, 8), flops=0.9, probe=False)
    with torch.no_grad():
        autogate.gates(model).alpha[::2] = 0
    autogate.gates(model).fold()
    return model


@pytest.mark.parametrize("training", [False, True])
def test_a_forward_that_computes_something_else_is_refused_by_name(training):
    model = closed(training)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(autogate.VerificationError, match="first module to compute something else is '0'") as raised:
        autogate.finalize(model, warn=False)
    assert ("in train mode" in str(raised.value)) is training
    assert "ignore=['0']" in str(raised.value)
    autogate.gates(model)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_norms_get_their_running_statistics_back():
    class Swapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 2, 3)
            self.register_buffer("mean", torch.zeros(()))

        def forward(self, x):
            y = self.a(x)
            if self.training:
                y = torch.cat([y[:, 4:], y[:, :4]], 1)
                self.mean.mul_(0.9).add_(0.1 * x.mean())
            return self.b(y)

    torch.manual_seed(0)
    model = autogate.prepare(Swapped(), torch.randn(2, 3, 8, 8), flops=0.9)
    with torch.no_grad():
        autogate.gates(model).alpha[0] = 0
    slim = autogate.finalize(model, warn=False)
    assert slim.a.out_channels == 6 and not slim.mean
