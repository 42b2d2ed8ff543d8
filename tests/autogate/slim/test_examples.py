"""Several example inputs: what each of them decides in a forward holds in the slim model."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import autogate
from autogate.slim.history import history_of
from autogate.slim.record_replay import replay
from rewriters import UndoLog, relative_error, run_eval
from rewriters.recording import tensor_slots

TOKENS = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
MASK = torch.ones(5, 5, dtype=torch.bool).tril()


class Attention(nn.Module):
    """Reads the same tokens, or those of a cache too, with a mask or without."""

    def __init__(self):
        super().__init__()
        self.embed, self.qkv, self.out = nn.Linear(6, 16), nn.Linear(16, 48), nn.Linear(16, 3)

    def forward(self, x, mask=None, cache=None):
        batch, tokens, _ = x.shape
        q, k, v = self.qkv(self.embed(x)).view(batch, tokens, 3, 8, 2).permute(2, 0, 3, 1, 4)
        if cache is not None:
            k, v = torch.cat([cache[0], k], 2), torch.cat([cache[1], v], 2)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None and cache is None)
        return self.out(y.transpose(1, 2).reshape(batch, tokens, -1)), y.mean(1)


CACHE = tuple(torch.randn(2, 8, 3, 2, generator=torch.Generator().manual_seed(i)).double() for i in range(2))


def prepared(*examples):
    torch.manual_seed(0)
    model = autogate.prepare(Attention().double().eval(), autogate.Examples(*examples), flops=0.9)
    with torch.no_grad():
        autogate.gates(model).alpha[-4:-1] = 0
    autogate.gates(model).fold()
    return model


def others(call):
    """The same call on other numbers of samples and tokens."""
    x = TOKENS.repeat(2, 1, 1)[:3]
    return (x, *((entry if entry is not MASK else ~MASK | MASK) for entry in call[1:]))


def test_a_slim_model_runs_in_each_way():
    model = prepared(TOKENS, (TOKENS, MASK))
    gated, slim = copy.deepcopy(model), autogate.finalize(model, warn=False)
    assert slim.qkv.out_features < 48
    for one in (slim, copy.deepcopy(slim), pickle.loads(pickle.dumps(slim))):
        for call in ((TOKENS,), (TOKENS, MASK), (TOKENS[:1],), (TOKENS[:1], ~MASK.T)):
            assert relative_error(run_eval(one, call), run_eval(gated, call)) <= 1e-12
    assert relative_error(run_eval(slim, (TOKENS,)), run_eval(slim, (TOKENS, MASK | True))) > 1e-6
    with pytest.raises(RuntimeError, match="Attention: the call is none of those that it was traced for"):
        slim(TOKENS, None, CACHE)


def test_examples_that_take_one_way_have_one_graph():
    model = prepared(TOKENS, TOKENS[:1, :3])
    slim = autogate.finalize(model, warn=False)
    assert len(slim.forward.functions[False]) == 1


def test_a_record_of_several_examples_is_replayed():
    model = prepared(TOKENS, (TOKENS, MASK))
    slim = autogate.finalize(model, warn=False)
    (record,) = history_of(slim).slimmings
    assert len(record.others) == 1
    again = Attention().double()
    replay(again, record, [((TOKENS,), {}), ((TOKENS, MASK), {})], UndoLog())
    again.load_state_dict(slim.state_dict())
    for call in ((TOKENS,), (TOKENS, MASK)):
        assert relative_error(run_eval(again, call), run_eval(slim, call)) == 0
    assert {name for name, *_ in tensor_slots(again)} == {name for name, *_ in tensor_slots(slim)}


def test_a_file_keeps_every_way(tmp_path):
    slim, path = autogate.finalize(prepared(TOKENS, (TOKENS, MASK)), warn=False), tmp_path / "slim.safetensors"
    autogate.save(slim, path)
    loaded = autogate.load(path, Attention().double())
    for call in ((TOKENS,), (TOKENS, MASK), (TOKENS[:1],), (TOKENS[:1], ~MASK.T)):
        assert relative_error(run_eval(loaded, call), run_eval(slim, call)) == 0
    assert history_of(loaded) == history_of(slim)


def test_a_slim_model_is_slimmed_again_in_each_way():
    slim = autogate.finalize(prepared(TOKENS, (TOKENS, MASK)), warn=False)
    model = autogate.prepare(slim, autogate.Examples(TOKENS, (TOKENS, MASK)), flops=0.9)
    with torch.no_grad():
        autogate.gates(model).alpha[-2:] = 0
    autogate.gates(model).fold()
    gated = copy.deepcopy(model)
    again = autogate.finalize(model, warn=False)
    for call in ((TOKENS,), (TOKENS, MASK)):
        assert relative_error(run_eval(again, call), run_eval(gated, call)) <= 1e-12


class Block(Attention):
    """Attention with a shortcut; with `twice` a second one, where there is a mask."""

    def __init__(self, twice: bool = False):
        super().__init__()
        self.embed, self.out, self.twice = nn.Linear(16, 16), nn.Linear(16, 16), twice
        if twice:
            self.last = nn.Linear(16, 16)

    def forward(self, x, mask=None):
        x = x + super().forward(x, mask)[0]
        return x + self.last(x) if self.twice and mask is not None else x


class Tower(nn.Module):
    """Blocks that all get the mask."""

    def __init__(self, *twice: bool):
        super().__init__()
        self.embed, self.blocks = nn.Linear(6, 16), nn.ModuleList(map(Block, twice))
        self.out = nn.Linear(16, 3)

    def forward(self, x, mask=None):
        x = self.embed(x)
        for block in self.blocks:
            x = block(x, mask)
        return self.out(x)


CALLS = ((TOKENS,), (TOKENS, MASK), (TOKENS[:1, :3],), (TOKENS[:1], ~MASK.T))


GIVEN = autogate.Examples(TOKENS, (TOKENS, MASK))


@pytest.mark.parametrize(
    ("example", "blocks"),
    [pytest.param(GIVEN, 2, id="given", marks=pytest.mark.slow), pytest.param((TOKENS, MASK), 1, id="found")],
)
def test_shortcuts_become_convolutions_in_each_way(example, blocks, tmp_path):
    torch.manual_seed(0)
    dense = Tower(*[False] * blocks).double().eval()
    model = autogate.prepare(copy.deepcopy(dense), example, shortcuts="conv")
    shortcuts = [layer.module for layer in autogate.summary(model).shortcuts]
    assert shortcuts == [f"blocks.{block}.shortcut_conv" for block in range(blocks)]
    for call in CALLS:
        assert relative_error(run_eval(model, call), run_eval(dense, call)) <= 1e-12
    with torch.no_grad():
        model.blocks[0].shortcut_conv.weight.add_(0.1)  # this one stays, another becomes a selection
        autogate.gates(model).alpha[::3] = 0
    autogate.gates(model).fold()
    gated, slim = copy.deepcopy(model), autogate.finalize(model, warn=False)
    assert [hasattr(block, "shortcut_conv") for block in slim.blocks] == [True, False][:blocks]
    autogate.save(slim, tmp_path / "slim.safetensors")
    loaded = autogate.load(tmp_path / "slim.safetensors", Tower(*[False] * blocks).double())
    for one in (slim, copy.deepcopy(slim), loaded):
        for call in CALLS:
            assert relative_error(run_eval(one, call), run_eval(gated, call)) <= 1e-12


def test_a_block_whose_shortcuts_not_all_examples_have_keeps_them_and_is_named():
    model = Tower(True, False).double()
    autogate.prepare(model, GIVEN, shortcuts="conv")
    found = autogate.summary(model)
    assert [layer.module for layer in found.shortcuts] == ["blocks.1.shortcut_conv"]
    assert found.shared == {"blocks.0": "not all examples have the same shortcuts in it"}
    assert "identity shortcut that stays" in str(found)


def test_a_warning_names_the_shortcuts_that_stay():
    with pytest.warns(UserWarning, match="or it has to stay .blocks.0: not all examples have the same shortcuts in it"):
        autogate.prepare(Tower(True), autogate.Examples(TOKENS.float(), (TOKENS.float(), MASK)), shortcuts="conv")


def test_no_example_is_refused():
    with pytest.raises(ValueError, match="at least one"):
        autogate.Examples()
