"""Random networks that choose for each image: what skips gives what is masked, whatever is off."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import autogate
from autogate import adaptive
from autogate.skipping import forwards_in
from rewriters import relative_error, run_eval
from tests.rewriters.draws import DRAWS, FRESH, chunks, over_seeds
from tests.rewriters.exactness import TOLERANCE
from tests.rewriters.random_networks import Recipe, build, inputs


def check(recipe: Recipe, share: float, seed: int) -> int:
    """Prepare a network, draw codes, finalize it and compare; returns how many layers skip."""
    network = build(recipe)
    model, example = network.model.eval(), (network.args, network.kwargs)
    before = run_eval(model, *example)
    try:
        adaptive.prepare(model, {"x": network.args[0]} | network.kwargs, flops=0.9999)
    except autogate.AutogateError as error:
        assert "no layer that could choose" in str(error) or "runs whole for every image" in str(error), error
        return 0
    assert relative_error(run_eval(model, *example), before) == 0
    draw(model, share, seed)
    fast = adaptive.finalize(copy.deepcopy(model), break_even=1, warn=False)
    for batch, more in ((3, 0), (1, 0), (4, 0), (2, 4)):
        if more and not model.any_size:
            continue
        args, kwargs = inputs(recipe, batch, more)
        error = relative_error(run_eval(fast, args, kwargs), run_eval(model, args, kwargs))
        assert error <= TOLERANCE, f"{error:.1e} off for inputs of shape {tuple(args[0].shape)}"
        assert torch.equal(adaptive.cost(fast), adaptive.cost(model))
    return len(forwards_in(fast))


def draw(model: nn.Module, share: float, seed: int) -> None:
    """Write weights into the saliency modules that close other channels for each image; `share` of them stay on."""
    random = torch.Generator().manual_seed(seed)
    level = torch.distributions.Normal(0.0, 1.0).icdf(torch.tensor(share).clamp(0.001, 0.999))
    with torch.no_grad():
        for module in adaptive.bank(model).saliency_modules:
            module.expand.weight.normal_(0, 0.3, generator=random)
            module.expand.bias.normal_(float(level) / 2 - 1, 0.5, generator=random)


@pytest.mark.parametrize("seeds", chunks(DRAWS), ids=str)
def test_networks_skip_exactly(seeds: range):
    found = over_seeds(check, seeds)
    assert FRESH or sum(count > 0 for count in found) > len(found) / 2
