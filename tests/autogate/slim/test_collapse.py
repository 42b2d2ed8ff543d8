"""finalize tells of layers that are nearly empty, and of outputs that are the same for all inputs."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

import autogate
from autogate.slim.collapse import is_constant, nearly_empty
from rewriters import Side, run_eval
from tests.autogate.criteria.nets import IMAGES, chain, stage


def closed(model: nn.Module, side: str, keep: int) -> nn.Module:
    """The prepared model, its gates closed along a side but for the first few."""
    model = autogate.prepare(model, IMAGES, flops=1.0)
    bank = autogate.gates(model)
    with torch.no_grad():
        bank.alpha[bank.channel_map.classes[Side(side, 0)][keep:]] = 0
    return model


def told(model: nn.Module, **options: bool) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        autogate.finalize(model, **options)
    return [str(one.message) for one in caught if one.category is autogate.CollapseWarning]


def test_a_layer_with_one_channel_is_named():
    (message,) = told(closed(chain(), "3.weight", 1))
    assert message.startswith("too much has died: at most one output channel is left of 3 (1 of 12). Ask for")


def test_two_channels_are_enough():
    assert told(closed(chain(), "3.weight", 2)) == []


def test_constant_outputs_are_told():
    (message,) = told(closed(chain(), "3.weight", 0))
    assert "3 (none of 12); the outputs don't depend on the inputs any more" in message


def test_a_dead_branch_beside_a_shortcut_leaves_outputs_that_depend_on_inputs():
    (message,) = told(closed(stage(), "blocks.0.0.weight", 0))
    assert "blocks.0.0 (none of 6)" in message and "depend" not in message


def test_nothing_is_told_where_nothing_died_or_nobody_asks():
    assert told(closed(chain(), "3.weight", 12)) == []
    assert told(closed(chain(), "3.weight", 0), warn=False) == []


def test_the_warning_as_an_error_leaves_the_model_as_it_was():
    model = closed(chain(), "3.weight", 1)
    before = run_eval(model, (IMAGES,))[0]
    with warnings.catch_warnings():
        warnings.simplefilter("error", autogate.CollapseWarning)
        with pytest.raises(autogate.CollapseWarning):
            autogate.finalize(model)
    assert torch.equal(run_eval(model, (IMAGES,))[0], before)
    assert autogate.finalize(model, warn=False)[3].out_channels == 1


def test_many_layers_are_counted():
    channel_map = autogate.gates(autogate.prepare(chain(), IMAGES)).channel_map
    assert len(nearly_empty(channel_map, torch.zeros(channel_map.size, dtype=torch.bool))) == 3


class Lookup(nn.Module):
    def __init__(self, dead: bool):
        super().__init__()
        self.table, self.fc, self.dead = nn.Embedding(9, 4), nn.Linear(4, 2), dead

    def forward(self, tokens):
        return self.fc(self.table(tokens).mean(1) * (0.0 if self.dead else 1.0) * torch.arange(1.0, 5.0))


@pytest.mark.parametrize("dead", [True, False])
def test_whole_numbers_change_places(dead):
    """The mean of the tokens in their order would be the same: rows change places, too."""
    tokens = torch.tensor([[0, 1, 2], [3, 4, 5]])
    assert is_constant(Lookup(dead), ((tokens,), {})) == dead
    assert not is_constant(Lookup(True), ((torch.zeros(2, 3, dtype=torch.int64),), {}))  # no others can be made
