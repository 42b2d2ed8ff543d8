"""GDP's numbers are what they were when its code was last shaped anew: sums of every buffer, stored.

A change that means to move them stores new ones, and says in CHANGELOG.md why.
"""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import nn

import autogate
from autogate.gating.bank import GateBank
from tests.autogate.gated_nets import ConvNet, gated_net


class Numbers(NamedTuple):
    """Sums over the buffers of a bank, and over the columns that it has left of its kernels."""

    alpha: float
    folded: float
    dead: float
    epsilon: float
    sensitivity: float
    balance: float
    integral: float
    peak: float
    kernels: float


STORED = {
    (0.5, False, False): {
        1: Numbers(63.619904, 59.72114, 0, 0.070790581, 0.00013891516, 59.388835, 0.011337869, 0.012, 339.0834),
        20: Numbers(32.744782, 52.07545, 10, 9.9887128e-05, 0.53245342, 0, 1.088248, 0.13948559, 1426.4676),
        40: Numbers(28.850886, 43.97555, 20, 9.9774383e-08, 6.8410486, 0, 1.2007209, 0.29831238, 5293.2482),
        130: Numbers(8.9217097, 42.976153, 21, 5e-08, 7.2752607, 0, 12.412396, 0.3, 6658.4804),
    },
    (0.3, True, False): {
        1: Numbers(39.762438, 37.32555, 0, 0.070790581, 0.00015865187, 59.388835, 0.011337869, 0.012, 339.05197),
        20: Numbers(13.058012, 32.742161, 6, 9.9887128e-05, 0.51154449, 0, 1.08012, 0.13948559, 1200.4559),
        40: Numbers(7.200532, 25.988668, 14, 9.9774383e-08, 5.4888642, 298.40874, 1.1251566, 0.29831238, 3471.4648),
        130: Numbers(4.8699768, 25.988668, 14, 5e-08, 5.8189443, 0, 1.1441919, 0.3, 4469.6295),
    },
    (0.6, False, True): {
        1: Numbers(63.619904, 59.72114, 0, 0.070790581, 0.00013891516, 59.388835, 0.011337869, 0.012, 339.0834),
        20: Numbers(34.235323, 55.77477, 8, 9.9887128e-05, 0.53245941, 0, 1.1337244, 0.13948559, 1428.5166),
        40: Numbers(32.139824, 47.972179, 16, 9.9774383e-08, 6.842393, 0, 1.156244, 0.29831238, 5313.279),
        130: Numbers(28.020274, 43.975849, 20, 5e-08, 7.4572423, 0, 0, 0.3, 6814.2199),
    },
}  # fmt: skip
"""By the share of FLOPs, whether the net is residual, whether widths are rounded: the sums after so many steps."""


PREPARED = {
    torch.optim.SGD: Numbers(10.527767, 42.98542, 21, 5e-08, 3.0235097, 0, 0, 0.3, 2008.4945),
    torch.optim.AdamW: Numbers(10.025679, 42.986005, 21, 5e-08, 1.6981209, 0, 0, 0.01, 2151.8426),
}
"""By optimizer, the sums after 30 of 60 steps of a net that `prepare` has prepared with its defaults."""


def sums(bank: GateBank) -> Numbers:
    buffers = {name: getattr(bank, name).double() for name in Numbers._fields[:-1]}
    buffers["dead"] = (bank.dead > 0).double()  # it holds the order in which they died
    kernels = sum(kernel.detach().double().abs().sum() for kernel in bank.kernels())
    return Numbers(*(float(buffer.sum()) for buffer in buffers.values()), float(kernels))


def quadratic(net: nn.Module) -> torch.Tensor:
    """A loss without a forward: it pulls each kernel to one of its own. No processor rounds it in its own way."""
    generator = torch.Generator().manual_seed(1)
    pulls = [(weight - torch.randn(weight.shape, generator=generator, dtype=weight.dtype)).square().sum()
             for weight in net.autogate.kernels()]  # fmt: skip
    return torch.stack(pulls).sum() / 100


@pytest.mark.parametrize(("flops", "residual", "rounded"), STORED)
def test_numbers_are_as_before(flops, residual, rounded):
    net, bank = gated_net(flops, steps=120, residual=residual, **({"round_to": 4} if rounded else {}))
    net.double()
    optimizer = torch.optim.SGD(net.parameters(), 0.3, momentum=0.5)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.3, total_steps=140)
    for step in range(130):
        optimizer.zero_grad()
        quadratic(net).backward()
        optimizer.step()
        schedule.step()
        if step + 1 in STORED[flops, residual, rounded]:
            found, wanted = sums(bank), STORED[flops, residual, rounded][step + 1]
            assert found == pytest.approx(wanted, rel=1e-6), step + 1


@pytest.mark.parametrize(
    ("kind", "settings"), [(torch.optim.SGD, {"lr": 0.3, "momentum": 0.5}), (torch.optim.AdamW, {"lr": 0.01})]
)
@pytest.mark.parametrize("method", [{}, {"method": autogate.GDP()}], ids=["default", "GDP()"])
def test_numbers_of_a_prepared_model_are_as_before(kind, settings, method):
    net = autogate.prepare(ConvNet(), torch.randn(2, 3, 6, 6), steps=60, **method).double()
    optimizer = kind(net.parameters(), **settings)
    for _step in range(30):
        optimizer.zero_grad()
        quadratic(net).backward()
        optimizer.step()
    assert sums(autogate.gates(net)) == pytest.approx(PREPARED[kind], rel=1e-6)
