"""The bank of gates: its state, its steps, and what it reports."""

import copy
import gc
import io
import pickle
import weakref

import pytest
import torch
from torch import nn

from autogate.budget.products import Flops
from autogate.methods.gate_function import gate_slope, gate_value
from rewriters.errors import AutogateError
from rewriters.labelling.channel_map import ALWAYS, ChannelMap, Kernel, Side
from tests.autogate.gated_nets import (
    ConvNet,
    backward,
    bank_of,
    batch,
    conv_net_map,
    gated_net,
    kernels_of,
    random_alpha,
    sides_of,
    train,
)


def test_building_a_bank_changes_no_number():
    torch.manual_seed(0)
    net = ConvNet()
    images, _ = batch(0)
    before, numbers = net(images), {name: value.clone() for name, value in net.state_dict().items()}
    net.eval()
    channel_map = conv_net_map()
    net.autogate = bank_of(net, channel_map, 0.5)
    net.train()
    torch.testing.assert_close(net(images), before, rtol=0, atol=0)
    for name, value in net.named_parameters():
        assert torch.equal(value, numbers[name]), name


def test_state_dict_keeps_the_models_names():
    plain = set(ConvNet().state_dict())
    net, _ = gated_net()
    added = "alpha folded dead epsilon sensitivity step_count balance integral settled peak layout"
    assert set(net.state_dict()) - plain == {f"autogate.{name}" for name in added.split()}
    assert dict(net.named_parameters()).keys() == dict(ConvNet().named_parameters()).keys()


@pytest.mark.parametrize("residual", [False, True])
def test_gradient_is_that_of_gates_on_the_activations(residual):
    """The bank's alpha step against autograd through explicit gates g(alpha) * x."""
    net, bank = gated_net(1.0, residual=residual)
    bank.alpha.copy_(random_alpha(bank))
    bank.fold()
    explicit = copy.deepcopy(net)
    for kernel, gate in zip(kernels_of(explicit), sides_of(bank, bank.folded), strict=True):
        kernel.data /= gate.view(1, -1, *[1] * (kernel.ndim - 2))
    alpha = bank.alpha.clone().requires_grad_()
    images, labels = batch(2)
    output = explicit(images, sides_of(bank, gate_value(alpha, float(bank.epsilon))))
    nn.functional.cross_entropy(output, labels).backward()

    backward(net, 2)
    bank.measure()
    found = bank._stepping.pending.reading * gate_slope(bank.alpha, bank.epsilon)
    scale = alpha.grad.abs().max().item()
    torch.testing.assert_close(found, alpha.grad, rtol=1e-3, atol=2e-3 * scale)


def test_columns_behind_nearly_closed_gates_move_like_kernels_behind_gates():
    """An SGD step of W under a gate in the forward pass moves V = W g by the gate's square."""
    net, bank = gated_net(1.0, steps=10**6)
    bank.alpha[:8] = 0.1
    net(batch(0)[0])
    gate = bank.folded[0].item()
    assert 0.05 < gate < 0.15
    before = net.conv2.weight.detach().clone()
    bank.measure()
    with torch.no_grad():
        net.conv2.weight.add_(1.0)
    bank.step(0.0)
    moved = net.conv2.weight.detach() - before
    torch.testing.assert_close(moved[:, :8], torch.full((24, 8, 3, 3), (gate / 0.5) ** 2), rtol=1e-3, atol=0)
    torch.testing.assert_close(moved[:, 8:], torch.ones(24, 8, 3, 3))


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_a_non_finite_gradient_moves_no_gate_but_dead_columns_stay_zero(broken):
    net, bank = gated_net()
    bank.alpha[0] = 0
    backward(net)
    alpha, epsilon = bank.alpha.clone(), bank.epsilon.clone()
    net.fc.weight.grad[1, 2] = broken
    bank.measure()
    with torch.no_grad():
        net.conv2.weight.add_(0.1)
    bank.step(0.1)
    assert torch.equal(bank.alpha, alpha) and torch.equal(bank.epsilon, epsilon) and bank.step_count == 0
    assert net.conv2.weight[:, 0].abs().max() == 0


def test_frozen_kernels_contribute_nothing():
    net, bank = gated_net(1.0)
    net.conv2.weight.requires_grad_(False)
    before = bank.alpha.clone()
    backward(net)
    bank.step(0.1)
    assert torch.equal(bank.alpha[:16], before[:16]) and not torch.equal(bank.alpha[16:], before[16:])


@pytest.mark.parametrize("convert", [nn.Module.half, nn.Module.bfloat16, nn.Module.double])
def test_converting_the_model_leaves_the_banks_numbers_alone(convert):
    net, bank = gated_net()
    before = {name: value.clone() for name, value in bank.named_buffers()}
    convert(net)
    for name, value in bank.named_buffers():
        assert value.dtype == before[name].dtype and torch.equal(value, before[name])
    assert net.conv1.weight.dtype != torch.float32


def test_a_deep_copy_has_a_bank_of_its_own():
    net, bank = gated_net()
    twin = copy.deepcopy(net)
    assert twin.autogate is not bank
    assert {id(k) for k in twin.autogate.kernels()} == {id(k) for k in kernels_of(twin)}
    with torch.no_grad():
        twin.autogate.alpha[0] = 0
    images, _ = batch(0)
    twin(images), net(images)
    assert twin.conv2.weight[:, 0].abs().max() == 0 and net.conv2.weight[:, 0].abs().max() > 0
    train(twin, torch.optim.SGD(twin.parameters(), 0.1), 2)
    assert twin.autogate.step_count == 2 and bank.step_count == 0


def test_a_pickled_model_comes_back_with_its_bank():
    net, _ = gated_net()
    train(net, torch.optim.SGD(net.parameters(), 0.1), 2)
    with torch.no_grad():
        net.autogate.alpha[3] = 0
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    for twin in (pickle.loads(pickle.dumps(net)), torch.load(file, weights_only=False)):
        images, _ = batch(0)
        assert torch.equal(twin.eval()(images), net.eval()(images))
        assert twin.conv2.weight[:, 3].abs().max() == 0
        train(twin.train(), torch.optim.SGD(twin.parameters(), 0.1), 1)
        assert twin.autogate.step_count == 3


def test_a_bank_keeps_no_model_alive():
    net, bank = gated_net()
    watch = weakref.ref(net)
    gc.disable()
    try:
        del net
        assert watch() is None
    finally:
        gc.enable()
    assert bank.kernels() == []
    other = nn.Linear(2, 2)
    other(torch.ones(1, 2)).sum().backward()
    torch.optim.SGD(other.parameters(), 0.1).step()


def test_a_run_resumes_exactly_from_its_state_dict():
    def optimizer_of(net):
        return torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)

    whole, _ = gated_net(steps=40)
    train(whole, optimizer_of(whole), 40)
    first, _ = gated_net(steps=40)
    optimizer = optimizer_of(first)
    train(first, optimizer, 17)
    second, _ = gated_net(steps=40, seed=5)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    resumed = optimizer_of(second)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(second, resumed, 23, first=17)
    assert whole.autogate.progress().dead > 0
    for (name, expected), found in zip(whole.state_dict().items(), second.state_dict().values(), strict=True):
        assert torch.equal(found, expected), name


def test_same_seed_same_gates():
    runs = []
    for _ in range(2):
        net, bank = gated_net(steps=30)
        train(net, torch.optim.SGD(net.parameters(), 0.1, momentum=0.9), 30)
        runs.append(bank.alpha)
    assert torch.equal(*runs) and (runs[0] == 0).any()


def test_a_sequential_model_runs_through_its_bank():
    net = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2))
    x = torch.randn(3, 4)
    before = net(x)
    classes = {Side("0.weight", 0): torch.arange(8), Side("0.bias", 0): torch.arange(8)}
    classes[Side("1.weight", 1)] = torch.arange(8)
    sizes = {Side(f"{i}.weight", dim): n for i, shape in enumerate([(8, 4), (2, 8)]) for dim, n in enumerate(shape)}
    kernels = (Kernel("0", "0.weight", 1.0, 1), Kernel("1", "1.weight", 1.0, 1))
    channel_map = ChannelMap(8, classes, sizes, kernels, (Side("1.weight", 1),), ())
    net.autogate = bank_of(net, channel_map, 0.5)
    assert torch.equal(net(x), before)


def test_compiled_forward_is_that_of_the_plain_model():
    net, bank = gated_net()
    images, _ = batch(0)
    compiled = torch.compile(net.eval(), backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(images), net(images))
    with torch.no_grad():
        bank.alpha[1] = 0
    bank.fold()
    torch.testing.assert_close(compiled(images), net(images))


def test_functional_calls_leave_the_real_kernels_alone():
    net, bank = gated_net()
    stand_ins = {name: value.detach().clone() for name, value in net.named_parameters()}
    bank.alpha[0] = 0
    torch.func.functional_call(net, stand_ins, (batch(0)[0],))
    assert not bank.dead.any() and net.conv2.weight[:, 0].abs().max() > 0


def test_an_averaged_copy_follows_the_dead():
    net, _ = gated_net(steps=30)
    average = torch.optim.swa_utils.AveragedModel(net, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9))
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    for step in range(30):
        train(net, optimizer, 1, first=step)
        average.update_parameters(net)
    average(batch(0)[0])
    live = net.autogate.live
    assert not live.all() and torch.equal(average.module.autogate.live, live)
    closed = [(kernel == 0).flatten(2).all(2).all(0) for kernel in map(torch.atleast_3d, kernels_of(average.module))]
    assert torch.equal(torch.cat(closed), ~live)


def test_detached_banks_do_nothing():
    net, bank = gated_net()
    bank.detach()
    with torch.no_grad():
        bank.alpha[0] = 0
    train(net, torch.optim.SGD(net.parameters(), 0.1), 1)
    assert bank.step_count == 0 and net.conv2.weight[:, 0].abs().max() > 0 and not net._forward_pre_hooks


def test_where_and_describe_say_where_a_class_lies():
    _, bank = gated_net(residual=True)
    places = bank.where(17)
    assert (Side("conv2.weight", 0), 1) in places and (Side("fc.weight", 1), 1) in places
    assert (Side("norm3.running_var", 0), 1) in places
    assert "conv3.weight[1] at 1, 2" in bank.describe([17, 18])


def test_repr_is_one_line_with_the_share_and_the_target():
    net, bank = gated_net(0.25, steps=70)
    bank.alpha[:3] = 0
    bank.fold()
    assert repr(bank) == f"GateBank(64 classes, 3 dead, FLOPs {bank.shares()['FLOPs']:.3f} -> 0.250, step 0 of 70)"
    assert repr(bank) in repr(net)


def test_progress_tells_the_state():
    net, bank = gated_net(0.5, steps=30)
    start = bank.progress()
    assert (start.step, start.dead, start.settled, start.balance) == (0, 0, False, 0.0)
    assert start.shares == {"FLOPs": 1.0} and start.targets == {"FLOPs": 0.5}
    train(net, torch.optim.SGD(net.parameters(), 0.1), 5)
    now = bank.progress()
    assert (
        now.step == 5
        and now.balance > 0
        and now.method_state["epsilon"] < start.method_state["epsilon"]
        and now.shares == bank.shares()
    )


def test_an_unreachable_target_is_refused():
    channel_map = conv_net_map()
    classes = {side: labels for side, labels in channel_map.classes.items() if side != Side("conv3.weight", 0)}
    pinned = ChannelMap(64, classes, channel_map.sizes, channel_map.kernels, channel_map.gated, ())
    pinned.classes[Side("conv3.weight", 1)] = torch.full((24,), ALWAYS)
    least = Flops(pinned).least
    assert least > 0.3
    with pytest.raises(AutogateError, match="can't be reached"):
        bank_of(ConvNet(), pinned, least - 0.01)


def test_a_kernel_that_is_no_parameter_is_refused_and_leaves_the_model_alone():
    net = ConvNet()
    del net.conv2.weight
    channel_map = conv_net_map()
    with pytest.raises(AutogateError, match=r"conv2\.weight"):
        bank_of(net, channel_map, 0.5)
    assert not net._forward_pre_hooks


def test_a_map_without_classes_makes_an_idle_bank():
    net = nn.Linear(2, 2)
    sizes = {Side("weight", 0): 2, Side("weight", 1): 2}
    channel_map = ChannelMap(0, {}, sizes, (Kernel("", "weight", 1.0, 1),), (), ())
    net.autogate = bank_of(net, channel_map, 1.0)
    net(torch.ones(1, 2)).sum().backward()
    net.autogate.step(0.1)
    assert net.autogate.progress().shares == {"FLOPs": 1.0}
