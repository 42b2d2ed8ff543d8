"""Channels that others determine are made up for, wherever they lie; what can't be compensated stays."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import autogate
from rewriters import AutogateError, Side, relative_error, run_eval

IMAGES = torch.randn(48, 3, 6, 6, generator=torch.Generator().manual_seed(0))
BATCHES = [(part,) for part in IMAGES.split(16)]


def doubled(first: nn.Module, shift: float = 1.0) -> nn.Module:
    """A layer whose last half of outputs is made of the first half, and shifted."""
    half = len(first.weight) // 2
    with torch.no_grad():
        first.weight[half:] = -2 * first.weight[:half]
        if first.bias is not None:
            first.bias[half:] = -2 * first.bias[:half] + shift
    return first


class Net(nn.Module):
    """A layer that is read by `parts`, by the given forward."""

    def __init__(self, forward, **parts: nn.Module):
        super().__init__()
        self.first, self.head = doubled(nn.Conv2d(3, 8, 1)), nn.Linear(6, 4)
        for name, part in parts.items():
            setattr(self, name, part)
        self.run = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.run(self, self.first(x)).relu().mean((2, 3)))


def strided(m, x):
    return m.a(x)


def normed(m, x):
    return m.norm(m.a(x))


def neither(m, x):
    return m.a(x).relu()


def twice_read(m, x):
    return m.a(x) + m.b(x)


def concatenated(m, x):
    return m.a(torch.cat([x, m.b(x)], 1))


def residual(m, x):
    return m.a(x + m.b(m.c(x)))


def by_product(m, x):
    return F.linear(x.movedim(1, -1), m.a.weight, m.a.bias).movedim(-1, 1)


def from_the_left(m, x):
    return (m.a.weight.flatten(1) @ x.flatten(2)).unflatten(2, x.shape[2:])


def shared(m, x):
    return m.a(x).relu() + m.a(x.flip(2))


def through_depthwise(m, x):
    return m.a(m.b(x))


NETS = {
    "strided": lambda: Net(strided, a=nn.Conv2d(8, 6, 3, stride=2)),
    "batch norm": lambda: Net(normed, a=nn.Conv2d(8, 6, 3, bias=False), norm=nn.BatchNorm2d(6)),
    "twice read": lambda: Net(twice_read, a=nn.Conv2d(8, 6, 1), b=nn.Conv2d(8, 6, 1, bias=False)),
    "concatenation": lambda: Net(concatenated, a=nn.Conv2d(10, 6, 1), b=nn.Conv2d(8, 2, 1)),
    "residual": lambda: Net(residual, a=nn.Conv2d(8, 6, 1), b=doubled(nn.Conv2d(4, 8, 1)), c=nn.Conv2d(8, 4, 1)),
    "linear": lambda: Net(by_product, a=nn.Linear(8, 6)),
    "shared": lambda: Net(shared, a=nn.Conv2d(8, 6, 1)),
    "depthwise": lambda: Net(through_depthwise, a=nn.Conv2d(8, 6, 1), b=nn.Conv2d(8, 8, 1, groups=8)),
}


def closing(model: nn.Module, classes: Sequence[int] = range(4, 8), **options) -> nn.Module:
    """Close the second half of the channels of `first`."""

    def by(bank):
        scores = torch.full((bank.channel_map.size,), torch.inf)
        scores[bank.channel_map.classes[Side("first.weight", 0)][list(classes)]] = 0
        return scores

    bank = autogate.gates(model)
    left = bank.live.cpu().index_fill(0, bank.channel_map.classes[Side("first.weight", 0)][list(classes)], False)
    share = bank.targets.shares(left)["FLOPs"]
    return autogate.close(model, by, flops=share + 1e-6, **options)


def error(model: nn.Module, wanted: list[Tensor]) -> float:
    return relative_error(run_eval(model, (IMAGES,)), wanted)


@pytest.mark.parametrize("name", NETS)
def test_channels_that_others_determine_are_made_up_for(name):
    torch.manual_seed(0)
    model = NETS[name]().eval()
    wanted = run_eval(model, (IMAGES,))
    model = autogate.prepare(model, IMAGES[:2], flops=0.9)
    plain = closing(copy.deepcopy(model))
    closing(model, batches=BATCHES, compensate=True)
    assert error(plain, wanted) > 0.05
    assert error(model, wanted) < error(plain, wanted) / 10
    gated = run_eval(model, (IMAGES,))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert all(map(torch.equal, run_eval(other, (IMAGES,)), gated))
    assert relative_error(run_eval(autogate.finalize(model), (IMAGES,)), gated) < 1e-5


@pytest.mark.parametrize("name", NETS)
def test_where_nothing_closes_nothing_changes(name):
    model = autogate.prepare(NETS[name](), IMAGES[:2], flops=1.0)
    before = copy.deepcopy(model.state_dict())
    autogate.close(model, "l1", batches=BATCHES, compensate=True)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items() if "autogate." not in key)


@pytest.mark.parametrize("forward", [neither, from_the_left])
def test_a_layer_without_bias_and_norm_gets_no_constant(forward):
    model = Net(forward, a=nn.Conv2d(8, 6, 1, bias=False))
    doubled(model.first, shift=0.0)
    wanted = run_eval(model, (IMAGES,))
    model = closing(autogate.prepare(model, IMAGES[:2], flops=0.9), batches=BATCHES, compensate=True)
    assert error(model, wanted) < 1e-2
    assert model.a.bias is None


def test_a_norm_that_others_use_keeps_its_mean():
    layers = {"a": nn.Conv2d(8, 6, 1, bias=False), "b": nn.Conv2d(8, 6, 1, bias=False), "norm": nn.BatchNorm2d(6)}
    model = Net(lambda m, x: m.norm(m.a(x)) + m.norm(m.b(x)), **layers)
    model = closing(autogate.prepare(model, IMAGES[:2], flops=0.9), batches=BATCHES, compensate=True)
    assert not model.norm.running_mean.any()


def test_places_of_a_grouped_convolution_are_made_up_for():
    """Two groups of four channels: a place dies in both, and is predicted alike in both."""
    model = Net(strided, a=nn.Conv2d(8, 6, 3, groups=2))
    with torch.no_grad():
        for group in (0, 4):
            for source, target in ((0, 2), (1, 3)):
                model.first.weight[group + target] = 3 * model.first.weight[group + source]
                model.first.bias[group + target] = 3 * model.first.bias[group + source]
    wanted = run_eval(model, (IMAGES,))
    model = autogate.prepare(model, IMAGES[:2], flops=0.9)
    closed = closing(copy.deepcopy(model), [2, 3, 6, 7])
    closing(model, [2, 3, 6, 7], batches=BATCHES, compensate=True)
    assert error(model, wanted) < error(closed, wanted) / 10


class Tied(nn.Module):
    """A table of words that is also the last layer."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.mix = nn.Embedding(20, 16), nn.Linear(16, 16)

    def forward(self, words: Tensor) -> Tensor:
        return F.linear(self.words(words) + self.mix(self.words(words)), self.words.weight)


def test_a_table_that_is_looked_up_keeps_its_words():
    words = torch.randint(20, (64, 5), generator=torch.Generator().manual_seed(0))
    model = autogate.prepare(Tied(), words[:2], flops=0.6)
    before = model.words.weight.clone()
    autogate.close(model, "l1", batches=[words], compensate=True)
    kept = autogate.gates(model).channel_map.kept(Side("words.weight", 1), autogate.gates(model).live.cpu())
    assert len(kept) < 16 and torch.equal(model.words.weight[:, kept], before[:, kept])


def test_gates_close_in_several_rounds():
    torch.manual_seed(0)
    model = NETS["batch norm"]().eval()
    wanted = run_eval(model, (IMAGES,))
    model = autogate.prepare(model, IMAGES[:2], flops=0.9)
    for classes in (range(4, 6), range(6, 8)):
        closing(model, classes, batches=iter(BATCHES), compensate=True)
    assert int((~autogate.gates(model).live).sum()) == 4 and error(model, wanted) < 1e-2


@pytest.mark.filterwarnings("ignore:the (model looks untrained|run has)")
def test_training_goes_on_behind_it():
    model = autogate.prepare(NETS["batch norm"](), IMAGES[:2], flops=0.9, steps=5)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    for step in range(4):
        if step == 2:
            closing(model, batches=BATCHES, compensate=True)
        optimizer.zero_grad()
        model.train()(IMAGES).square().mean().backward()
        optimizer.step()
    assert not model.a.weight[:, 4:].any() and model.training
    gated = run_eval(model, (IMAGES,))
    assert relative_error(run_eval(autogate.finalize(model), (IMAGES,)), gated) < 1e-5


@pytest.mark.parametrize(
    ("batches", "says"),
    [
        (None, "yields none"),
        ([], "yields none"),
        ([IMAGES, IMAGES[..., :4]], "can't be joined"),
        ([IMAGES.clone().fill_(torch.nan)], "not finite"),
    ],
)
def test_bad_batches_leave_the_model_as_it_was(batches, says):
    model = autogate.prepare(NETS["strided"](), IMAGES[:2], flops=0.6)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(AutogateError, match=says):
        autogate.close(model, "l1", batches=batches, compensate=True)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
