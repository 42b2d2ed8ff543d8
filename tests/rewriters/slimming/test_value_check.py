"""A model is slimmed once before training and its values compared: what differs keeps its channels, with the reason."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from rewriters.analysis import analyse
from rewriters.slimming.value_check import Checked, Refused, check_values, pin_refused
from rewriters.undo_log import UndoLog
from tests.rewriters.helpers import Net, conv, image, is_pinned, reasons

SHUFFLED = [
    nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 16, 1), nn.PixelShuffle(2), nn.Flatten(), nn.Linear(256, 4),
]  # fmt: skip
"""A flattened pixel shuffle: shapes fit, and contents don't."""


def checked(model: nn.Module, *args, refused=()) -> Checked:
    """What the check finds, and that it leaves nothing behind."""
    state, attributes = copy.deepcopy(model.state_dict()), [dict(vars(module)) for module in model.modules()]
    random = torch.get_rng_state()
    undo_log = UndoLog()
    analysis = analyse(model, args)
    pin_refused(analysis, refused, 2)
    analysis.place_statistics(model, undo_log)
    found = check_values(model, analysis, [(args, {})], refused)
    undo_log.undo()
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    assert [dict(vars(module)) for module in model.modules()] == attributes
    assert torch.equal(torch.get_rng_state(), random)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_first_module_that_computes_other_values_is_found(dtype):
    torch.manual_seed(0)
    model, x = nn.Sequential(*copy.deepcopy(SHUFFLED)).to(dtype), torch.randn(2, 3, 4, 4, dtype=dtype)
    found = checked(model, x)
    assert found.refused is not None and found.refused.path == "3"
    assert "it computes other values" in found.refused.reason
    analysis = analyse(model, (x,))
    pin_refused(analysis, [found.refused], 2)
    assert is_pinned(analysis.channel_map, "2.weight", 0) and not is_pinned(analysis.channel_map, "0.weight", 0)
    assert any("it computes other values" in reason for reason in reasons(analysis.channel_map, "2.weight", 0))
    assert checked(model, x, refused=[found.refused]).fine


def factor(m, y):
    return y * y.shape[1] ** -0.5


def inner(m, x):
    return factor(m, m.layer(x))


def test_it_is_the_code_around_a_module_that_gives_it_other_values():
    block = Net(lambda m, x: m.after(factor(m, m.layer(x))), layer=conv(4, 8), after=conv(8, 4))
    model = nn.Sequential(conv(3, 4), nn.Sequential(block), conv(4, 2))
    assert checked(model, image()).refused.path == "1.0"


@pytest.mark.parametrize("training", [False, True])
def test_values_are_compared_in_train_mode_too(training):
    block = Net(lambda m, x: factor(m, m.a(x)) if m.training is training else m.a(x), a=conv(3, 8))
    model = nn.Sequential(block, nn.BatchNorm2d(8), nn.Dropout(0.5), conv(8, 4))
    reason = checked(model, image()).refused.reason
    assert reason.startswith("slim, it computes other values") and ("in train mode" in reason) is training


def test_a_branch_that_begins_at_zero_hides_nothing():
    block = Net(lambda m, x: x + m.norm(m.b(factor(m, m.a(x)))), a=conv(4, 8), b=conv(8, 4), norm=nn.BatchNorm2d(4))
    nn.init.zeros_(block.norm.weight)
    assert checked(nn.Sequential(conv(3, 4), block, conv(4, 2)), image()).refused.path == "1"


def test_what_fails_when_it_is_slim_is_found():
    model = Net(lambda m, x: m.b(m.a(x) * {8: 1.0}[m.a.weight.shape[0]]), a=conv(3, 8), b=conv(8, 2))
    assert checked(model, image()).refused == Refused("", "slim, it fails (KeyError: 6)")


def test_right_models_pass():
    for model in (
        nn.Sequential(conv(3, 8), nn.BatchNorm2d(8), nn.ReLU(), conv(8, 2)),
        Net(lambda m, x: m.b(torch.cat(m.a(x).chunk(2, 1)[::-1], 1)), a=conv(3, 8), b=conv(8, 2)),
        Net(lambda m, x: m.b(m.a(x) + torch.randn_like(m.a(x))), a=conv(3, 8), b=conv(8, 2)),
        nn.Sequential(conv(3, 8), nn.GroupNorm(1, 8), conv(8, 2)),
    ):
        assert checked(model, image()) == Checked(compared=True)


def test_a_large_image_is_compared_small_and_by_one_sample():
    seen = []
    model = Net(lambda m, x: seen.append(tuple(x.shape)) or m.b(m.a(x)), a=conv(3, 8), b=conv(8, 2))
    analysis = analyse(model, (torch.randn(4, 3, 224, 224),))
    seen.clear()
    assert check_values(model, analysis, [((torch.randn(4, 3, 224, 224),), {})]).fine
    assert set(seen) == {(1, 3, 64, 64)}


def test_a_model_without_values_is_not_compared():
    with torch.device("meta"):
        model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 2, 1))
    x = torch.empty(2, 3, 4, 4, device="meta")
    assert not check_values(model, analyse(model, (x,)), [((x,), {})]).compared
