"""torch's transformer layers without their fused kernels: what padded positions get."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import autogate
from rewriters import UndoLog, relative_error
from rewriters.forwards import disable_fused_layers

X = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
PADDING = torch.tensor([[False] * 5, [False] * 2 + [True] * 3])
CALLS = {
    "without": (X,), "bool": (X, PADDING), "float": (X, torch.zeros(2, 5).double().masked_fill(PADDING, float("-inf"))),
    "on the left": (X, PADDING.flip(1)), "one sample": (X[1:], PADDING[1:]), "other length": (X[:, :4], PADDING[:, :4]),
}  # fmt: skip


class Encoder(nn.Module):
    def __init__(self, norm: nn.Module | None = None):
        super().__init__()
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(16, 4, 24, dropout=0.0, batch_first=True)
        self.embed, self.encoder, self.out = nn.Linear(6, 16), nn.TransformerEncoder(layer, 1, norm), nn.Linear(16, 3)
        if norm is not None:
            nn.init.normal_(norm.bias)

    def forward(self, x, padding=None):
        return self.out(self.encoder(self.embed(x), src_key_padding_mask=padding))


def run(model: nn.Module, training: bool, gradients: bool) -> dict[str, torch.Tensor]:
    model.train(training)
    with torch.set_grad_enabled(gradients):
        return {name: model(*call).detach() for name, call in CALLS.items()}


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    for name in CALLS:
        assert relative_error([one[name]], [other[name]]) <= 1e-12, name


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize(("norm", "embed"), [(True, True), pytest.param(False, False, marks=pytest.mark.slow)])
def test_padded_positions_get_what_torch_gives_them(norm, embed):
    """Zeros from the nested tensor in eval mode without gradients, and a value as anywhere else in other modes."""
    dense = Encoder(nn.LayerNorm(16) if norm else None).double()
    examples = autogate.Examples((X, PADDING), X)
    model = autogate.prepare(copy.deepcopy(dense).eval(), examples, flops=0.9, embed=embed)
    modes = [(False, False), (False, True), (True, True)]
    for mode in modes:
        assert_same(run(model, *mode), run(dense, *mode))
    padded = [run(model, *mode)["bool"][1, 3] for mode in modes]
    assert relative_error(padded[:1], padded[1:2]) > 0.1
    assert relative_error(padded[1:2], padded[2:]) <= 1e-12
    with torch.no_grad():
        autogate.gates(model).alpha[::3] = 0
    autogate.gates(model).fold()
    gated = copy.deepcopy(model)
    slim = autogate.finalize(model, warn=False)
    assert slim.encoder.layers[0].linear1.out_features < 24
    for one in (slim, pickle.loads(pickle.dumps(slim))):
        for mode in modes:
            assert_same(run(copy.deepcopy(one), *mode), run(gated, *mode))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_the_callers_hooks_see_what_they_saw():
    model, seen = Encoder().double().eval(), []
    handle = model.encoder.register_forward_hook(lambda module, args, output: seen.append(output))
    undo_log = UndoLog()
    with torch.no_grad():
        model(X, PADDING)
        disable_fused_layers(model, undo_log)
        disable_fused_layers(model, undo_log)
        model(X, PADDING)
    assert relative_error(seen[1:], seen[:1]) <= 1e-12
    assert not seen[1][1, 2:].any()
    undo_log.undo()
    assert list(model.encoder._forward_hooks) == [handle.id]
    assert model.encoder.use_nested_tensor


def test_layers_that_the_caller_runs_give_padded_positions_a_value():
    model = Encoder().double().eval()
    disable_fused_layers(model, UndoLog())
    with torch.no_grad():
        y = model.embed(X)
        for layer in model.encoder.layers:
            y = layer(y, src_key_padding_mask=PADDING)
    assert y[PADDING].abs().min() > 0
