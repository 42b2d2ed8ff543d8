"""Gates stay multiplied into the kernels, and dead columns stay zero."""

import copy

import pytest
import torch
from torch import nn

from autogate.methods.gate_function import gate_value
from rewriters.errors import AutogateError
from rewriters.labelling.channel_map import ALWAYS, ChannelMap, Kernel, Side
from tests.autogate.gated_nets import (
    bank_of,
    batch,
    gated_net,
    kernels_of,
    random_alpha,
    sides_of,
)


@pytest.mark.parametrize("residual", [False, True])
def test_folded_gates_equal_gates_on_the_activations(residual):
    net, bank = gated_net(residual=residual)
    explicit = copy.deepcopy(net)
    for kernel, gate in zip(kernels_of(explicit), sides_of(bank, bank.folded), strict=True):
        kernel.data /= gate.view(1, -1, *[1] * (kernel.ndim - 2))
    bank.alpha.copy_(random_alpha(bank))
    images, _ = batch(1)
    found = net(images)
    torch.testing.assert_close(bank.folded, bank.gates(), rtol=2e-3, atol=0)
    torch.testing.assert_close(found, explicit(images, sides_of(bank, bank.folded)), rtol=1e-4, atol=1e-5)


def test_killing_by_hand_is_seen_by_the_next_forward_and_is_final():
    net, bank = gated_net()
    images, _ = batch(0)
    with torch.no_grad():
        bank.alpha[[0, 5, 20]] = 0
    net(images)
    assert net.conv2.weight[:, [0, 5]].abs().max() == 0 and net.conv3.weight[:, 4].abs().max() == 0
    assert bank.live.sum() == len(bank.live) - 3
    with torch.no_grad():
        bank.alpha[5] = 1
    net(images)
    assert bank.alpha[5] == 0 and not bank.live[5] and net.conv2.weight[:, 5].abs().max() == 0
    assert bank.gates()[[0, 5, 20]].tolist() == [0, 0, 0]


def test_dead_columns_are_zero_whatever_moved_them():
    net, bank = gated_net()
    bank.alpha[:4] = 0
    images, _ = batch(0)
    net(images)
    with torch.no_grad():
        net.conv2.weight.add_(1)
    net(images)
    assert net.conv2.weight[:, :4].abs().max() == 0
    assert net.conv2.weight[:, 4:].abs().min() > 0


def test_dead_channels_contribute_nothing():
    net, bank = gated_net()
    net.eval()
    bank.alpha[[1, 2, 30, 50]] = 0
    images, _ = batch(0)
    before = net(images)
    with torch.no_grad():
        net.conv1.weight[[1, 2]] += 7
        net.norm2.weight[14] -= 3
    assert torch.equal(net(images), before)


def test_a_state_that_gates_depend_on_is_folded_too():
    """Written with alpha as it was, as a checkpoint does: the gates follow, and no column is scaled."""
    net, bank = gated_net()
    net(batch(0)[0])
    numbers = [kernel.detach().clone() for kernel in kernels_of(net)]
    bank.epsilon.fill_(0.01)
    net(batch(0)[0])
    torch.testing.assert_close(bank.folded, torch.full((64,), 1 / 1.01))
    assert all(torch.equal(kernel, before) for kernel, before in zip(kernels_of(net), numbers, strict=True))


def test_folding_again_changes_nothing():
    net, bank = gated_net()
    bank.alpha.copy_(random_alpha(bank))
    bank.alpha[3] = 0
    bank.fold()
    numbers = [kernel.detach().clone() for kernel in kernels_of(net)]
    versions = [kernel._version for kernel in kernels_of(net)]
    bank.fold()
    assert [kernel._version for kernel in kernels_of(net)] == versions
    bank.alpha.copy_(bank.alpha.clone())
    bank.fold()
    assert all(torch.equal(kernel, number) for kernel, number in zip(kernels_of(net), numbers, strict=True))


def test_non_finite_alpha_is_named_and_nothing_is_folded():
    net, bank = gated_net()
    before = net.conv2.weight.detach().clone()
    bank.alpha[2] = float("nan")
    bank.alpha[0] = 0
    with pytest.raises(AutogateError, match=r"conv2\.weight\[1\] at 2"):
        net(batch(0)[0])
    assert torch.equal(net.conv2.weight, before) and not bank.dead.any()


def test_a_shared_kernel_is_folded_and_counted_once():
    net = nn.Module()
    net.first = nn.Linear(4, 4, bias=False)
    net.second = nn.Linear(4, 4, bias=False)
    net.second.weight = net.first.weight
    gated = (Side("first.weight", 1), Side("second.weight", 1))
    kernels = (Kernel("first", "first.weight", 1.0, 1), Kernel("second", "second.weight", 1.0, 1))
    sizes = {Side(kernel.weight, dim): 4 for kernel in kernels for dim in (0, 1)}
    channel_map = ChannelMap(4, {side: torch.arange(4) for side in gated}, sizes, kernels, gated, ())
    bank = bank_of(net, channel_map, 1.0)
    before = net.first.weight.detach().clone()
    bank.alpha.fill_(0.3)
    bank.fold()
    ratio = gate_value(torch.tensor(0.3), 0.1) / gate_value(torch.tensor(1.0), 0.1)
    torch.testing.assert_close(net.first.weight.detach(), before * ratio)
    net.first.weight.grad = torch.ones_like(before)
    bank.measure()
    assert bank._stepping.pending is not None
    torch.testing.assert_close(bank._stepping.pending.reading, net.first.weight.detach().sum(0) / bank.folded)


def test_a_class_may_lie_on_a_side_many_times_and_beside_pinned_ones():
    net = nn.Sequential(nn.Linear(6, 2))
    side = Side("0.weight", 1)
    sizes = {side: 6, Side("0.weight", 0): 2}
    classes = {side: torch.tensor([0, 0, ALWAYS, 1, 1, 1])}
    channel_map = ChannelMap(2, classes, sizes, (Kernel("0", "0.weight", 1.0, 1),), (side,), ())
    bank = bank_of(net, channel_map, 1.0)
    before = net[0].weight.detach().clone()
    bank.alpha[0] = 0
    bank.fold()
    assert net[0].weight[:, :2].abs().max() == 0 and torch.equal(net[0].weight[:, 2:], before[:, 2:])
    net[0].weight.grad = torch.ones_like(before)
    bank.measure()
    expected = torch.stack([torch.tensor(0.0), before[:, 3:].sum() / bank.folded[1]])
    torch.testing.assert_close(bank._stepping.pending.reading, expected)


def test_changes_that_a_half_precision_kernel_would_round_away_wait():
    net, bank = gated_net()
    net.bfloat16()
    before = net.conv2.weight.detach().clone()
    folded = bank.folded.clone()
    for _ in range(3):
        bank.alpha.mul_(0.995)
        bank.fold()
        assert torch.equal(net.conv2.weight, before) and torch.equal(bank.folded, folded)
    bank.alpha.mul_(0.9)
    bank.fold()
    assert not torch.equal(net.conv2.weight, before)
    torch.testing.assert_close(bank.folded, bank.gates())


def test_what_dies_later_has_a_larger_number():
    _, bank = gated_net()
    bank.close(torch.tensor([4, 2]))
    bank.alpha[7] = 0
    bank.fold()
    bank.close(torch.tensor([0]))
    assert torch.argsort(bank.dead[[4, 2, 7, 0]]).tolist() == [0, 1, 2, 3]
    assert (
        not bank.dead[bank.live].any()
        and (bank.dead[~bank.live] > 0).all()
        and int(bank.live.sum()) == len(bank.live) - 4
    )
