"""Methods as text, in run folders and slim files."""

import math

import pytest
import torch

import autogate
from autogate.methods.text import method_of
from autogate.slim.history import history_of
from rewriters import AutogateError
from tests.autogate.gated_nets import ConvNet, train


@pytest.mark.parametrize(
    "method",
    [
        autogate.GDP(), autogate.GDP(reach=0.2, gate="kernel"), autogate.ClippedLasso(a=math.inf, lam=1e-2),
        autogate.GDP.published(lam=2e-3, epochs=350, steps_per_epoch=391),
    ],
)  # fmt: skip
def test_a_method_is_read_from_what_it_prints(method):
    assert method_of(repr(method)) == method


@pytest.mark.parametrize(
    "text", ["GDP", "GDP(0.2)", "GDP(width=3)", "Other()", "GDP(reach=exit())", "GDP(**{})", "", "GDP().published()"]
)
def test_anything_else_is_refused_and_nothing_is_run(text):
    with pytest.raises(AutogateError, match="makes no method"):
        method_of(text)


def test_a_slim_file_tells_the_method(tmp_path):
    torch.manual_seed(0)
    net = autogate.prepare(ConvNet(), torch.randn(2, 3, 6, 6), steps=30, method=autogate.GDP(reach=0.2))
    train(net, torch.optim.SGD(net.parameters(), 0.05), 30)
    autogate.save(autogate.finalize(net), tmp_path / "slim.safetensors")
    loaded = autogate.load(tmp_path / "slim.safetensors", model=ConvNet())
    assert history_of(loaded).slimmings[-1].method == "GDP(reach=0.2)"
