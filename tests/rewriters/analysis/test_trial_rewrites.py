"""Forwards are rewritten for trial patterns before training, once for forwards that are the same."""

from __future__ import annotations

import torch
from torch import nn

from rewriters.analysis import trial_rewrites as trials
from rewriters.analysis.analyse import analyse
from tests.rewriters.exactness import assert_exact
from tests.rewriters.helpers import Net, conv, image


def tiled(x, like):
    """Scaled by its mean, which a call of no family repeats as often as another tensor has channels."""
    return x * x.mean(1, keepdim=True).tile(1, like.shape[1], 1, 1)


class Reader(nn.Module):
    """Takes its size from a tensor that loses other channels: it has no form for fewer of them."""

    def forward(self, y, z):
        return tiled(y, z)


class Halves(nn.Module):
    def forward(self, x):
        first, second = x.split([2, 4], 1)
        return torch.cat([second, first], 1)


def test_a_forward_unlike_the_others_is_tried_too():
    def forward(m, x):
        y = m.b(z := m.a(x))
        return m.d(m.halves(m.c(m.reader(y, z))))

    model = Net(forward, a=conv(3, 4), b=conv(4, 4), reader=Reader(), c=conv(4, 6), halves=Halves(), d=conv(6, 2))
    slimmed = assert_exact(model.double().eval(), (image().double(),))
    assert slimmed.analysis.channel_map.size == 6


class OfAnothersShape(nn.Module):
    """Has no form for fewer channels of the first, because it takes their number from the third."""

    def forward(self, first, second, third):
        return tiled(first, third), tiled(second, second)


def test_forwards_of_whose_inputs_others_stay_are_not_alike():
    def forward(m, x):
        kept, third = m.kept(x), m.third(x)
        first, _ = m.refuses(m.first(x), kept, third)
        _, second = m.works(kept, m.second(x), third)
        return m.a(first) + m.b(second), kept, third

    convolutions = {name: conv(3, 4) for name in ("kept", "third", "first", "second")}
    model = Net(forward, refuses=OfAnothersShape(), works=OfAnothersShape(), a=conv(4, 2), b=conv(4, 2), **convolutions)
    slimmed = assert_exact(model.double().eval(), (image().double(),))
    assert slimmed.analysis.channel_map.size == 4  # the second's


def test_alike_forwards_are_tried_once(monkeypatch):
    tried = []
    plain = trials._tried
    monkeypatch.setattr(trials, "_tried", lambda traced, mask: tried.append(traced.path) or plain(traced, mask))
    layers = [layer for width in (6, 6, 6) for layer in (conv(width, 6), Halves())]
    model = nn.Sequential(conv(3, 6), *layers, conv(6, 2)).eval()
    assert len(analyse(model, (image(),)).traced) == 3
    assert len(set(tried)) == 1
