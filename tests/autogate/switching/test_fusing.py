"""Each subnet is the slim model of its channels, output for output."""

from __future__ import annotations

import copy

import pytest
import torch
import torch._dynamo.testing
from torch import nn

import autogate
from autogate import subnets
from autogate.switching.bank import SUBNETS
from tests.autogate.switching.nets import closed, fused, small_net


def both(model, slim, x, train=False):
    """Outputs of a switchable and a slim model, with the same random numbers."""
    outputs = []
    for one in (model, slim):
        one.train(train)
        torch.manual_seed(0)
        outputs.append(one(x))
    return outputs


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("shortcuts", ["shared", "conv"])
@pytest.mark.parametrize("nested", [False, True])
def test_a_subnet_computes_and_learns_what_the_slim_model_does(train, shortcuts, nested):
    model, example = small_net()
    switchable, slim = fused(model, example, (0.3, 0.6), nested, shortcuts=shortcuts)
    for number, one in enumerate(slim):
        subnets.switch(switchable, number)
        mine, theirs = both(switchable, one, example[:2], train)
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-10)
        switchable.zero_grad()
        mine.square().sum().backward()
        theirs.square().sum().backward()
        subnet = switchable._modules[SUBNETS].subnet
        own = {tensor.name: tensor.at.own() for tensor in subnet.own}
        cuts = {part.name: part.cut for part in subnet.overlay.slices}
        shared = dict(switchable.named_parameters())
        for name, parameter in one.named_parameters():
            dense = own[name] if name in own else shared[name]
            gradient = dense.grad if name in own or name not in cuts else cuts[name](dense.grad)
            torch.testing.assert_close(gradient, parameter.grad, rtol=1e-9, atol=1e-10, msg=name)


def test_an_extracted_subnet_is_a_slim_model(net, tmp_path):
    switchable, slim, example = net
    for _ in subnets.each(switchable.train()):
        switchable(example)
    switchable.eval()
    for number, one in enumerate(slim):
        alone = subnets.extract(switchable, number)
        shapes = {name: p.shape for name, p in alone.named_parameters()}
        assert shapes == {name: p.shape for name, p in one.named_parameters()}
        with subnets.active(switchable, number):
            assert torch.equal(alone(example), switchable(example))
        autogate.save(alone, tmp_path / "one.safetensors")
        assert torch.equal(autogate.load(tmp_path / "one.safetensors")(example), alone(example))
    whole = subnets.extract(switchable, "full")
    assert torch.equal(whole(example), switchable(example)) and SUBNETS not in whole._modules


def test_norms_may_share_their_affine_parameters():
    model, example = small_net()
    found = subnets.of(closed(model, example, 0.4, 0))
    switchable = subnets.fuse(model, found, norms="statistics")
    own = [name for name in switchable.state_dict() if name.startswith(f"{SUBNETS}.0")]
    assert own and all(
        name.rpartition(".")[2] in ("running_mean", "running_var", "num_batches_tracked") for name in own
    )


def test_structures_of_another_model_are_refused_and_nothing_is_left():
    model, example = small_net("test_resnet")
    other, _ = small_net("test_efficientnet")
    found = subnets.of(closed(model, example, 0.5, 0))
    before = {path: set(module.__dict__) for path, module in other.named_modules()}
    with pytest.raises(autogate.AutogateError):
        subnets.fuse(other, found)
    assert before == {path: set(module.__dict__) for path, module in other.named_modules()}


def test_two_of_one_name_are_refused():
    model, example = small_net()
    prepared = closed(model, example, 0.5, 0)
    with pytest.raises(autogate.AutogateError, match="two subnets are called 'a'"):
        subnets.fuse(model, subnets.of(prepared, prepared, names=["a", "a"]))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_padded_positions_of_an_encoder_get_what_the_slim_model_gives_them():
    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            layer = nn.TransformerEncoderLayer(16, 4, 24, dropout=0.0, batch_first=True)
            self.embed, self.encoder = nn.Linear(6, 16), nn.TransformerEncoder(layer, 1)
            self.out = nn.Linear(16, 3)

        def forward(self, x, padding):
            return self.out(self.encoder(self.embed(x), src_key_padding_mask=padding))

    torch.manual_seed(0)
    model, x = Encoder().double(), torch.randn(2, 5, 6, dtype=torch.float64)
    padding = torch.tensor([[False] * 5, [False] * 2 + [True] * 3])
    examples = autogate.Examples((x, padding))
    switchable = subnets.fuse(copy.deepcopy(model), subnets.find(model, examples, flops=(0.6,), by="l2"))
    slim = autogate.finalize(autogate.close(autogate.prepare(copy.deepcopy(model), examples, flops=0.6), by="l2"))
    for number in (0, 1, 0):
        subnets.switch(switchable, number)
        other = slim if number == 0 else model
        for training, gradients in ((False, False), (False, True), (True, True)):
            with torch.set_grad_enabled(gradients):
                outputs = [one.train(training)(x, padding) for one in (switchable, other)]
            torch.testing.assert_close(*outputs, rtol=1e-10, atol=1e-10)
    with torch.no_grad():
        assert switchable.eval()(x, padding)[1, 3:].std(0).max() < 1e-12
        torch.testing.assert_close(subnets.extract(switchable, 0)(x, padding), switchable(x, padding))
        torch.testing.assert_close(copy.deepcopy(switchable)(x, padding), switchable(x, padding))
