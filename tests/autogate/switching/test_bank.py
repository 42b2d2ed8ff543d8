"""Switching: bit for bit, in copies and checkpoints, never in the middle of a forward."""

from __future__ import annotations

import copy
import io
import pickle
import threading

import pytest
import torch
import torch._dynamo.testing
from torch import nn

import autogate
from autogate import subnets
from autogate.switching.bank import SUBNETS
from rewriters.slimming import TensorSlice
from tests.autogate.switching.nets import closed, fused, small_net


def test_switching_leaves_every_bit(net):
    switchable, _, example = net
    before = {name: tensor.clone() for name, tensor in switchable.state_dict().items()}
    attributes = {path: dict(module.__dict__) for path, module in switchable.named_modules() if SUBNETS not in path}
    wanted = switchable(example)
    for number in (0, 1, 0, 2, 1, 2):
        subnets.switch(switchable, number)
        switchable(example)
    assert torch.equal(switchable(example), wanted)
    assert all(torch.equal(tensor, before[name]) for name, tensor in switchable.state_dict().items())
    for path, module in switchable.named_modules():
        if SUBNETS not in path and path:
            for name in ("in_channels", "out_channels", "groups", "num_features"):
                assert module.__dict__.get(name) == attributes[path].get(name)


def test_the_dense_model_is_the_largest_subnet_and_keeps_its_names(net):
    model, example = small_net()
    switchable, _, _ = net
    assert type(switchable) is type(model)
    dense = model.state_dict()
    mine = {name: tensor for name, tensor in switchable.state_dict().items() if not name.startswith(SUBNETS)}
    assert list(mine) == list(dense) and all(torch.equal(mine[name], dense[name]) for name in dense)
    assert torch.equal(switchable(example), model(example))


def test_slices_follow_the_weights(net):
    switchable, _, example = net
    subnets.switch(switchable, 0)
    with torch.no_grad():
        before = switchable(example)
        for parameter in switchable.parameters():
            parameter.mul_(1.1)
        after = switchable(example)
    assert not torch.equal(before, after)
    assert torch.equal(after, subnets.extract(switchable, 0)(example))


def test_a_switch_that_fails_leaves_the_active_subnet(net, monkeypatch):
    """There may be too little memory for its slices."""
    switchable, _, example = net
    subnets.switch(switchable, 1)
    wanted, sizes = switchable(example), str(switchable)

    def full(self):
        raise torch.OutOfMemoryError("no memory")

    with monkeypatch.context() as patch:
        patch.setattr(TensorSlice, "take", full)
        with pytest.raises(torch.OutOfMemoryError):
            subnets.switch(switchable, 0)
    assert [row.active for row in subnets.status(switchable).rows] == [False, True, False]
    assert str(switchable) == sizes and torch.equal(switchable(example), wanted)


@pytest.mark.parametrize("way", ["copy", "pickle", "save"])
@pytest.mark.parametrize("grad", [False, True])
def test_copies_are_switchable_themselves(net, way, grad):
    switchable, _, example = net
    subnets.switch(switchable, 0)
    with torch.set_grad_enabled(grad):
        wanted = switchable(example)
    if way == "copy":
        copied = copy.deepcopy(switchable)
    elif way == "pickle":
        copied = pickle.loads(pickle.dumps(switchable))
    else:
        torch.save(switchable, buffer := io.BytesIO())
        copied = torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)
    assert torch.equal(copied(example), wanted)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.zero_()
    subnets.switch(copied, 1)
    subnets.switch(copied, 0)
    assert not copied(example).any() and torch.equal(switchable(example), wanted)
    assert subnets.status(switchable).rows[0].active


def test_a_checkpoint_holds_all_subnets(net):
    switchable, _, example = net
    for active in subnets.each(switchable.train()):
        switchable(example + active.number)
    other, _ = fused(*small_net(), (0.2, 0.5))
    other.load_state_dict(switchable.state_dict())
    for number in range(3):
        subnets.switch(switchable, number)
        subnets.switch(other, number)
        assert torch.equal(switchable.eval()(example), other.eval()(example))


def test_a_checkpoint_with_other_subnets_is_refused(net):
    switchable, _, _ = net
    model, example = small_net()
    prepared = [closed(model, example, share, seed) for seed, share in enumerate((0.5, 0.2))]
    state = switchable.state_dict()
    other = subnets.fuse(model, subnets.of(*prepared, names=["0", "1"]))
    other.load_state_dict(state)
    moved = subnets.fuse(small_net()[0], subnets.of(*(closed(small_net()[0], example, 0.5, 7) for _ in range(1))))
    for one in (state, {**state, f"{SUBNETS}.layout": torch.tensor(1.0)}):
        with pytest.raises(RuntimeError, match=r"autogate_subnets: these subnets have other channels"):
            moved.load_state_dict(one)
    assert moved.half()._modules[SUBNETS].layout.dtype == torch.float64
    moved.load_state_dict(moved.state_dict())


class Slow(nn.Module):
    """A network whose forward can be stopped in the middle."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 4, 3)
        self.middle = lambda: None

    def forward(self, x):
        x = self.conv1(x)
        self.middle()
        return self.conv2(x.relu())


def test_no_forward_sees_two_subnets():
    model, example = Slow(), torch.randn(2, 3, 8, 8)
    switchable = subnets.fuse(model, subnets.of(closed(model, example, 0.5, 0)))
    inside, go_on = threading.Event(), threading.Event()
    switchable.middle = lambda: (inside.set(), go_on.wait(20))
    thread = threading.Thread(target=switchable, args=(example,))
    thread.start()
    assert inside.wait(20)
    with pytest.raises(autogate.AutogateError, match="would see two subnets"):
        subnets.switch(switchable, 0)
    go_on.set()
    thread.join()
    assert subnets.switch(switchable, 0).name != "full"


def test_after_a_failed_forward_it_can_be_switched(net):
    switchable, _, example = net
    with pytest.raises(RuntimeError):
        switchable(example[:, :2])
    subnets.switch(switchable, 0)


class CopiesItself(nn.Module):
    """A model whose class says how to copy it."""

    def __init__(self):
        super().__init__()
        self.conv1, self.norm, self.conv2 = nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.Conv2d(16, 4, 3)
        self.copies = 0

    def forward(self, x):
        return self.conv2(self.norm(self.conv1(x)).relu())

    def __deepcopy__(self, memo):
        copied = type(self)()
        copied.load_state_dict(self.state_dict())
        copied.copies = self.copies + 1
        return copied.train(self.training)


def test_a_class_that_copies_itself_is_copied_with_its_subnets():
    model, example = CopiesItself().eval(), torch.randn(2, 3, 8, 8)
    switchable = subnets.fuse(model, subnets.find(model, example, flops=(0.3, 0.6), by="l1"))
    subnets.switch(switchable, 1)
    copied = copy.deepcopy(switchable)
    assert type(copied) is CopiesItself and copied.copies == switchable.copies + 1
    assert [row.active for row in subnets.status(copied).rows] == [False, True, False]
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.mul_(2)
        assert not torch.equal(copied(example), switchable(example))
        for number in (1, 0, 2):
            subnets.switch(copied, number)
            assert torch.equal(copied(example), subnets.extract(copied, number)(example))
            with subnets.active(switchable, number):
                assert torch.equal(switchable(example), subnets.extract(switchable, number)(example))
    autogate.recalibrate(switchable, [example])
