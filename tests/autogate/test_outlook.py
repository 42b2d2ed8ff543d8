"""What budgets would come to: the shares and widths of models that are really made, and what is out of reach."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

import autogate
from autogate.inspection import Duration
from rewriters import AutogateError
from tests.autogate.criteria.nets import IMAGES, chain, stage


def test_each_share_is_a_model_that_was_made():
    model = chain().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = autogate.what_if(model, IMAGES, (0.8, 0.4), seconds=0.001)
    closed = autogate.finalize(autogate.close(autogate.prepare(chain_like(model), IMAGES, flops=0.4)))
    wide, narrow, least = found.variants
    assert wide.shares["FLOPs"] == pytest.approx(0.8, abs=0.05) and narrow.shares["FLOPs"] == pytest.approx(
        0.4, abs=0.05
    )
    layers = {name: layer.out_channels for name, layer in closed.named_modules() if isinstance(layer, nn.Conv2d)}
    assert {name: narrow.widths[name] for name in layers} == layers
    assert least.asked is None and set(list(least.widths.values())[:-1]) == {1}
    assert found.widths == {"0": 8, "3": 12, "6": 8, "11": 5}
    assert least.shares == found.least and found.least["FLOPs"] < 0.05
    assert all(isinstance(one.latency, Duration) and one.latency.median > 0 for one in (found, *found.variants))
    assert model.training and not hasattr(model, "autogate")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def chain_like(model: nn.Module) -> nn.Module:
    copied = chain()
    copied.load_state_dict(model.state_dict())
    return copied


def test_what_is_out_of_reach_is_told_beside_the_rest():
    found = autogate.what_if(chain(), IMAGES, (0.7, 0.0001), ignore=["3"], seconds=0.001)
    half, nothing, least = found.variants
    assert half.problem == least.problem == "" and "can't be reached" in nothing.problem
    assert nothing.latency is None and not nothing.widths
    assert least.widths["3"] == 12
    assert "the caller asked for it" in found.table()


def test_the_table_and_json():
    found = autogate.what_if(stage(), IMAGES, (0.5,), of="params", by="random", seconds=0.001)
    table = found.table()
    for text in ("What is left, by random", "parameters asked for", "blocks.0.3", "the model returns it", "least"):
        assert text in table
    read = json.loads(found.to_json())
    assert read["resource"] == "parameters" and read["variants"][0]["widths"] == found.variants[0].widths
    assert read["latency"]["median"] == found.latency.median


@pytest.mark.parametrize(
    ("options", "says"),
    [({"by": "l7"}, "no criterion 'l7'"), ({"shares": (1.2,)}, r"in \(0, 1\]"), ({"by": "taylor"}, "needs batches")],
)
def test_what_is_wrong_is_said(options, says):
    with pytest.raises(AutogateError, match=says):
        autogate.what_if(chain(), IMAGES, seconds=0.001, **options)
