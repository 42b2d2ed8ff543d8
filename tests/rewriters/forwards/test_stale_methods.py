"""Methods whose sizes slimming has changed, called by themselves: forward was rewritten, they were not."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import autogate


class Encoder(nn.Module):
    """`encode` holds a size, `sizes_of_its_own` reads it off its input, `decode` only calls a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Conv1d(3, 16, 1), nn.Conv1d(16, 16, 1), nn.Linear(16, 5)
        self.half = 8

    def encode(self, x):
        x = self.a(x)
        return self.b(self.sizes_of_its_own(torch.cat([x[:, self.half :], x[:, : self.half]], 1)))

    def sizes_of_its_own(self, x):
        return x.reshape(x.shape[0], x.shape[1], -1)

    def decode(self, x):
        return self.head(x.mean(-1))

    def embed(self, x):
        return self.encode(x)

    def forward(self, x):
        return self.decode(self.encode(x))


def slim_and_gated() -> tuple[nn.Module, nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 7)
    gated = autogate.prepare(Encoder().eval(), x, flops=0.5)
    with torch.no_grad():
        autogate.gates(gated).alpha[::3] = 0
    autogate.gates(gated).fold()
    return autogate.finalize(copy.deepcopy(gated), warn=False), gated, x


@pytest.mark.parametrize("copied", [lambda m: m, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))],
                         ids=["itself", "copy", "pickle"])  # fmt: skip
def test_a_method_with_another_size_is_refused_by_name(copied):
    slim, gated, x = slim_and_gated()
    slim = copied(slim)
    for method in (slim.encode, slim.embed):
        with pytest.raises(autogate.AutogateError, match="the model: encode holds a size that slimming has changed"):
            method(x)
    torch.testing.assert_close(slim(x), gated(x), rtol=1e-5, atol=1e-5)


def test_methods_without_such_sizes_stay():
    slim, gated, x = slim_and_gated()
    assert "decode" not in vars(slim) and "sizes_of_its_own" not in vars(slim)
    assert "encode" not in vars(gated) and gated.encode(x).shape == (2, 16, 7)


def test_a_model_whose_finalize_fails_keeps_its_methods(monkeypatch):
    _, gated, x = slim_and_gated()
    monkeypatch.setattr("autogate.slim.finalizing.verify", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        autogate.finalize(gated, warn=False)
    assert gated.encode(x).shape == (2, 16, 7)


def test_a_model_that_is_slimmed_again_still_refuses_them():
    slim, _, x = slim_and_gated()
    again = autogate.prepare(slim, x, flops=0.9)
    again = autogate.finalize(autogate.close(again, "l1"), warn=False)
    with pytest.raises(autogate.AutogateError, match="encode holds a size"):
        again.encode(x)
