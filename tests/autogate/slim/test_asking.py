"""What finalize asks besides its inputs: copies, and inputs made from these."""

import copy

import pytest
import torch
from torch import nn

import autogate
from autogate.slim import asking
from rewriters import VerificationError
from tests.autogate.slim.test_found_ways import IMAGES, Net, larger, prepared


def without_forwards(model):
    """A copy that loses what was rewritten."""
    copied = copy.deepcopy(model)
    for module in copied.modules():
        vars(module).pop("forward", None)
    return copied


def test_a_copy_that_is_another_model_is_refused(monkeypatch):
    monkeypatch.setattr(asking, "_COPIES", {"a copy of the slim model": without_forwards})
    model = prepared(Net(lambda y: y), IMAGES)
    with pytest.raises(VerificationError, match=r"a copy of the slim model fails: .*probe=False"):
        autogate.finalize(model, warn=False)
    assert "forward" in vars(autogate.finalize(model, warn=False, probe=False).block)


def test_copies_share_tensors_and_those_that_the_dense_model_has_none_of_are_left_out():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU())
    copies = asking.copies_of(model)
    assert len(copies) == 2
    for made in copies.values():
        copied = made(model)
        assert copied is not model and copied[0].weight is model[0].weight
    model.handle = lambda: None
    assert list(asking.copies_of(model)) == ["a deep copy of the slim model"]


def test_a_model_is_asked_what_it_takes():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    asked = [answer.probe.what for answer in asking.ask(model, ((torch.randn(2, 3, 6, 6),), {}))]
    assert asked == ["for a small input", "for one sample", "for 3 samples and a length of 7"]
    flat = nn.Sequential(nn.Flatten(), nn.Linear(108, 4))
    asked = [answer.probe.what for answer in asking.ask(flat, ((torch.randn(2, 3, 6, 6),), {}))]
    assert asked == ["for a small input", "for one sample", "for 3 samples"]
    assert asking.ask(nn.Identity(), ((torch.full((2, 3), float("nan")),), {})) == []


class Scaled(nn.Module):
    """Takes a statistic along channels, and asks for the number of samples."""

    def forward(self, x):
        x = x * 2 if len(x) > 2 else x
        return x - x.mean(1, keepdim=True)


def test_a_norm_that_asks_for_the_batch_is_right_for_others_when_prepared():
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Conv2d(3, 8, 1), Scaled(), nn.Conv2d(8, 4, 1)).double().eval()
    model = prepared(copy.deepcopy(dense), IMAGES)
    plain = autogate.prepare(copy.deepcopy(dense), IMAGES, flops=0.9)
    torch.testing.assert_close(plain(larger(IMAGES)), dense(larger(IMAGES)))
    gated, slim = copy.deepcopy(model), autogate.finalize(model, warn=False)
    assert slim[0].out_channels < 8
    torch.testing.assert_close(slim(larger(IMAGES)), gated(larger(IMAGES)))
