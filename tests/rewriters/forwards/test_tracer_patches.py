"""Torch is patched while forwards are followed, once for all of them, and is as before afterwards."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from rewriters.forwards import tracer_patches as following
from rewriters.forwards.tracer_patches import patches_held
from tests.rewriters.helpers import Net, analysed, conv

METHODS = ((torch, "zeros"), (F, "conv2d"), (torch.autocast, "__enter__"), (torch._C, "_set_grad_enabled"),
           (nn.Module, "__call__"), (nn.Module, "__getattr__"))  # fmt: skip


class Rows(nn.Module):
    """Holds a size, so that its forward is traced; notes how modules are called meanwhile."""

    def __init__(self, note: Callable[[object], None]) -> None:
        super().__init__()
        self.scale, self.note = nn.Parameter(torch.ones(4, 1)), note

    def forward(self, x):
        self.note(nn.Module.__call__)
        return (x.reshape(x.shape[0], 4, -1) * self.scale).reshape(x.shape)


def three_traces() -> list[set[object]]:
    """How modules were called in each of three forwards that are traced."""
    calls: list[set[object]] = [set(), set(), set()]
    first, second, third = (Rows(found.add) for found in calls)
    analysis = analysed(
        lambda m, x: m.b(m.third(m.second(m.first(m.a(x))))),
        a=conv(3, 4), b=conv(4, 2), first=first, second=second, third=third,
    )  # fmt: skip
    assert [one.path for one in analysis.traced] == ["first", "second", "third"]
    return calls


def test_several_traces_take_one_patch(monkeypatch):
    entered, plain = [], following._modules_patched
    monkeypatch.setattr(following, "_modules_patched", lambda: entered.append(1) or plain())
    three_traces()
    assert len(entered) == 1


def test_torch_fx_leaves_alone_what_is_patched():
    calls = three_traces()
    assert calls[0] and calls[0] == calls[1] == calls[2]


def test_all_is_as_before_afterwards():
    before = [getattr(home, name) for home, name in METHODS]
    three_traces()
    assert [getattr(home, name) for home, name in METHODS] == before
    with pytest.raises(KeyError), patches_held() as patches:
        assert [getattr(home, name) for home, name in METHODS] == before  # until something is traced
        patches.put()
        assert all(getattr(home, name) != was for (home, name), was in zip(METHODS, before, strict=True))
        raise KeyError
    assert [getattr(home, name) for home, name in METHODS] == before


def test_who_is_not_followed_is_served_as_ever():
    net = Net(lambda m, x: m.a(torch.zeros(1, 3, 2, 2) + x).amax(), a=conv(3, 4))
    wanted = net(torch.ones(()))
    with patches_held() as patches, torch.autocast("cpu", enabled=False):
        patches.put()
        assert torch.equal(net(torch.ones(())), wanted)
