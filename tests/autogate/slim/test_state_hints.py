"""A state_dict of a gated, slim or dense model in a model of another form: a sentence beside PyTorch's list of keys."""

from __future__ import annotations

import copy
import pickle

import pytest
import timm
import torch
from torch import nn

import autogate


def dense() -> nn.Module:
    return timm.create_model("test_resnet", num_classes=4)


def gated(dead: int = 0) -> nn.Module:
    model = autogate.prepare(dense(), torch.randn(2, 3, 32, 32))
    with torch.no_grad():
        autogate.gates(model).alpha[:dead] = 0
    return model


def slim(dead: int = 20) -> nn.Module:
    return autogate.finalize(gated(dead), warn=False)


@pytest.fixture(scope="module")
def forms() -> dict[str, nn.Module]:
    return {"dense": dense(), "gated": gated(), "slim": slim(), "other": slim(40)}


@pytest.mark.parametrize(
    ("into", "state", "message"),
    [
        ("gated", "dense", "this model has gates, and the state has none. Load a dense state before autogate.prepare"),
        ("gated", "slim", "this model has gates, and the state has none. .* a slim model with autogate.load"),
        ("slim", "dense", "this model is slim, and the state is of the dense model"),
        ("slim", "gated", "this model is slim, and the state is of one with gates"),
        ("slim", "other", "this model is slim, and the state is of one slimmed otherwise"),
    ],
)
def test_a_state_of_another_form_is_named(into, state, message, forms):
    model = copy.deepcopy(forms[into])
    with pytest.raises(RuntimeError, match=message):
        model.load_state_dict(forms[state].state_dict())
    around = nn.ModuleDict({"network": model})
    with pytest.raises(RuntimeError, match=message):
        around.load_state_dict(nn.ModuleDict({"network": forms[state]}).state_dict())
    if (into, state) != ("gated", "dense"):  # that fits, and gates start anew
        with pytest.raises(RuntimeError, match=message):
            model.load_state_dict(forms[state].state_dict(), strict=False)
    with pytest.raises(RuntimeError, match=message):
        pickle.loads(pickle.dumps(model)).load_state_dict(forms[state].state_dict())


@pytest.mark.parametrize("form", ["dense", "gated", "slim"])
def test_its_own_form_loads(form, forms):
    copy.deepcopy(forms[form]).load_state_dict(forms[form].state_dict())


def test_gates_start_anew_where_the_caller_says_so(forms):
    copy.deepcopy(forms["gated"]).load_state_dict(forms["dense"].state_dict(), strict=False)
    copy.deepcopy(forms["slim"]).load_state_dict({}, strict=False)


def test_a_slim_model_with_gates_again_takes_its_own_state(forms):
    again = autogate.prepare(copy.deepcopy(forms["slim"]), torch.randn(2, 3, 32, 32))
    copy.deepcopy(again).load_state_dict(again.state_dict())


def test_pytorch_s_lists_hold_keys_and_no_sentences(forms):
    """They are what `strict=False` returns, for programs to read."""
    without = copy.deepcopy(forms["gated"]).load_state_dict(forms["dense"].state_dict(), strict=False)
    assert "autogate.alpha" in without.missing_keys
    assert all(key.startswith("autogate.") and " " not in key for key in without.missing_keys)
    whole = slim(0)
    with_gates = whole.load_state_dict(forms["gated"].state_dict(), strict=False)
    assert "autogate.alpha" in with_gates.unexpected_keys and not with_gates.missing_keys
    assert all(key.startswith("autogate.") and " " not in key for key in with_gates.unexpected_keys)
    with pytest.raises(RuntimeError, match="this model is slim, and the state is of one with gates"):
        whole.load_state_dict(forms["gated"].state_dict())
