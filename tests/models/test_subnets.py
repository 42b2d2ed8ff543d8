"""Subnets of models of many families: each is the slim model of its channels."""

import pytest
import torch

from autogate import subnets
from tests.autogate.switching.nets import fused
from tests.models.test_timm_families import FAMILIES, NORMS_IN_FLOAT32, build
from tests.slow import slow_but

QUICKEST = ("starnet_s050",)
"""Those that run by default."""

TAKEN = [name for number, name in enumerate(FAMILIES) if number % 2 or name in QUICKEST]
"""Half of the families: each takes as long as three models that are finalized."""


@pytest.mark.filterwarnings("ignore:.*changed nothing")
@pytest.mark.parametrize("name", slow_but(QUICKEST, TAKEN))
def test_every_subnet_is_the_slim_model_of_its_channels(name):
    nested = TAKEN.index(name) % 2 == 0
    model, example = build(name)
    tolerance = 1e-5 if name in NORMS_IN_FLOAT32 else 1e-10
    switchable, slim = fused(model, example, (0.3, 0.6, 0.85), nested)
    before = {name: tensor.clone() for name, tensor in switchable.state_dict().items()}
    more = torch.cat([example, example[:1]])
    for number in (0, 1, 2, 0):
        subnets.switch(switchable, number)
        for x in (example, more):
            with torch.no_grad():
                mine, theirs = switchable.eval()(x), slim[number].eval()(x)
            torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=tolerance)
    assert all(torch.equal(tensor, before[name]) for name, tensor in switchable.state_dict().items())
