"""Modules that torch.fx can't trace, or that pass keyword arguments on, keep their own code if that is right."""

from __future__ import annotations

import copy
import itertools
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import autogate
from benchmarks.parts import kill
from rewriters.labelling import Side
from rewriters.outputs import relative_error, run_eval
from tests.rewriters.exactness import TOLERANCE

WIDTH, HEADS = 8, 4


class Cache:
    """Keys and values of earlier calls, for each layer."""

    def __init__(self):
        self.kept = {}

    def update(self, layer, key, value):
        if layer in self.kept:
            key, value = (torch.cat(pair, 2) for pair in zip(self.kept[layer], (key, value), strict=True))
        self.kept[layer] = key, value
        return key, value


class Attention(nn.Module):
    """Attention with a cache, whose sizes are its attributes."""

    def __init__(self, layer=0):
        super().__init__()
        self.layer, self.heads, self.width, self.inner = layer, HEADS, WIDTH, HEADS * WIDTH
        self.qkv, self.out = nn.Linear(12, 3 * self.inner), nn.Linear(self.inner, 12)

    def split(self, x):
        return (part.view(*x.shape[:-1], self.heads, self.width) for part in self.qkv(x).split(self.inner, -1))

    def forward(self, x, cache=None, mask=None):
        query, key, value = (part.transpose(1, 2) for part in self.split(x))
        if cache is not None:
            key, value = cache.update(self.layer, key, value)
        y = F.scaled_dot_product_attention(query, key, value, mask)
        return self.out(y.transpose(1, 2).reshape(x.shape[0], -1, self.inner))


class Model(nn.Module):
    def __init__(self, kind=Attention):
        super().__init__()
        self.stem, self.attention, self.norm, self.head = nn.Linear(6, 12), kind(), nn.LayerNorm(12), nn.Linear(12, 3)

    def forward(self, x, cache=None, mask=None):
        y = self.stem(x)
        y = y + self.attention(y, cache if cache is not None else Cache(), mask)
        return self.head(self.norm(y.view((-1, *x.shape[1:-1], y.size(-1)))))


def tokens(samples=2, length=5):
    return torch.randn(samples, length, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(length))


def prepared(model, **options):
    torch.manual_seed(0)
    return autogate.prepare(model.double().eval(), tokens(), flops=0.5, **options)


def closed(model):
    kill(model, 0.4)
    autogate.gates(model).fold()
    return copy.deepcopy(model), autogate.finalize(model, warn=False)


def test_sizes_in_attributes_follow():
    gated, slim = closed(prepared(Model()))
    attention = slim.attention
    assert 0 < attention.heads < HEADS and attention.inner == attention.heads * WIDTH and attention.width == WIDTH
    assert "forward" not in vars(attention) and "forward" not in vars(slim)
    mask = torch.ones(4, 4, dtype=torch.bool).tril()
    for call in ((tokens(3),), (tokens(1, 9),), (tokens(2, 4), None, mask)):
        for one in (slim, copy.deepcopy(slim), pickle.loads(pickle.dumps(slim))):
            assert relative_error(run_eval(one, call), run_eval(gated, call)) <= TOLERANCE


def test_a_cache_is_continued():
    gated, slim = closed(prepared(Model()))
    caches = Cache(), Cache()
    for length in (5, 1, 1):
        wanted, got = (model(tokens(2, length), cache) for model, cache in zip((gated, slim), caches, strict=True))
        assert relative_error([got], [wanted]) <= TOLERANCE
    assert caches[1].kept[0][0].shape[1] == slim.attention.heads


def test_attributes_are_as_before_after_prepare():
    model = prepared(Model())
    assert [type(one) for one in (model.attention.heads, model.attention.width)] == [int, int]
    assert model.attention.heads == HEADS


class Scaled(Attention):
    """Divides by a number that slimming would change."""

    def forward(self, x, cache=None, mask=None):
        return super().forward(x, cache, mask) / self.inner


class Branching(Attention):
    def forward(self, x, cache=None, mask=None):
        y = super().forward(x, cache, mask)
        return y * 2 if self.heads > HEADS - 1 else y


class Fixed(Attention):
    def split(self, x):
        return (part.view(*x.shape[:-1], HEADS, WIDTH) for part in self.qkv(x).split(self.inner, -1))


class Rooted(Attention):
    """Takes a factor from a size that slimming changes."""

    def split(self, x):
        return [part * part.shape[-2] ** -0.5 for part in Attention.split(self, x)]


@pytest.mark.parametrize("kind", [Scaled, Branching, Fixed, Rooted])
def test_code_that_would_compute_something_else_keeps_its_channels(kind):
    model = prepared(Model(kind), probe=False)
    assert Side("attention.out.weight", 1) not in autogate.gates(model).channel_map.classes
    gated, slim = closed(model)
    assert slim.attention.heads == HEADS
    assert relative_error(run_eval(slim, (tokens(3),)), run_eval(gated, (tokens(3),))) <= TOLERANCE


class Passing(nn.Module):
    """Passes what it is given on."""

    def __init__(self):
        super().__init__()
        self.heads, self.qkv, self.out = HEADS, nn.Linear(12, 3 * HEADS * WIDTH), nn.Linear(HEADS * WIDTH, 12)

    def forward(self, x, cache, mask, **options):
        query, key, value = self.qkv(x).unflatten(-1, (3, self.heads, -1)).transpose(1, 3).unbind(2)
        y = F.scaled_dot_product_attention(query, key, value, mask, **options)
        return self.out(y.transpose(1, 2).flatten(2))


class Calling(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.attention, self.head = nn.Linear(6, 12), Passing(), nn.Linear(12, 3)

    def forward(self, x, **options):
        return self.head(self.attention(self.stem(x), None, None, scale=0.5, **options))


def test_what_is_passed_on_may_be_more_than_in_the_example():
    gated, slim = closed(prepared(Calling()))
    assert slim.attention.heads < HEADS
    wanted, got = (run_eval(model, (tokens(3),), {"is_causal": True}) for model in (gated, slim))
    assert relative_error(got, wanted) <= TOLERANCE


class Transposing(nn.Module):
    """Takes keyword arguments of any name, and reads a property of a tensor."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(12, 8), nn.Linear(8, 12)

    def forward(self, x, **options):
        y = self.first(x).mT
        return self.second(y.reshape(y.shape).mT) * options["scale"]


class Scaled(Model):
    def forward(self, x):
        return self.head(self.norm(self.attention(self.stem(x), scale=2.0)))


def test_properties_of_tensors_in_code_that_is_not_traced():
    model = prepared(Scaled(Transposing))
    assert autogate.summary(model).reach == 1.0
    gated, slim = closed(model)
    assert slim.attention.first.out_features < 8
    assert relative_error(run_eval(slim, (tokens(3, 7),)), run_eval(gated, (tokens(3, 7),))) <= TOLERANCE


class ConvLSTM(nn.Module):
    """Shi et al., "Convolutional LSTM Network", equation 3, without peepholes: a loop over the frames of a clip."""

    def __init__(self, how):
        super().__init__()
        self.hidden, self.how = 8, how
        self.gates, self.out = nn.Conv2d(3 + 8, 32, 3, padding=1), nn.Conv2d(8, 4, 1)

    def forward(self, clip):
        b, n, _, *size = clip.shape
        h = c = clip.new_zeros(b, self.hidden, *size)
        outs = []
        for frame in clip.unbind(1) if self.how == "unbind" else (clip[:, t] for t in range(n)):
            gates = self.gates(torch.cat([frame, h], 1))
            i, f, g, o = gates.chunk(4, 1) if self.how == "chunk" else gates.split(self.hidden, 1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
            outs.append(self.out(h))
        return torch.stack(outs, 1)


@pytest.mark.parametrize("how", ["unbind", "chunk"])
def test_a_loop_over_frames_keeps_its_code_and_takes_any_number(how, tmp_path):
    torch.manual_seed(0)
    clip = torch.randn(3, 7, 3, 5, 5).double()
    model = autogate.prepare(ConvLSTM(how).double().eval(), clip[:2, :2], flops=0.5)
    kill(model, 0.4)
    gated, slim = copy.deepcopy(model), autogate.finalize(model, warn=False)
    assert "forward" not in vars(slim) and slim.hidden == slim.out.in_channels < 8
    autogate.save(slim, tmp_path / "slim.safetensors")
    loaded = autogate.load(tmp_path / "slim.safetensors", ConvLSTM(how).double())
    for one, frames in itertools.product((slim, copy.deepcopy(slim), loaded), (1, 2, 7)):
        inputs = (clip[:, :frames],)
        assert relative_error(run_eval(one, inputs), run_eval(gated, inputs)) <= TOLERANCE
