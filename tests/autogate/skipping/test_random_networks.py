"""Random networks that choose for each image: what skips gives what is masked, whatever is off."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from torch import nn

import autogate
from autogate import adaptive
from autogate.skipping import forwards_in
from rewriters import relative_error, run_eval
from tests.rewriters.draws import DRAWS, FIRST, FRESH, chunks, over_seeds
from tests.rewriters.exactness import TOLERANCE
from tests.rewriters.random_networks import Recipe, build, inputs


def check(recipe: Recipe, share: float, seed: int) -> int:
    """Prepare a network, draw codes, finalize it and compare; returns how many layers skip.

    Every second one loses the channels that none of the inputs uses on which it is compared.
    """
    model = build(recipe).model.eval()
    sizes = [(3, 0), (1, 0), (4, 0), *([(2, 4)] if model.any_size else [])]
    calls = [{"x": args[0], **kwargs} for args, kwargs in (inputs(recipe, *size) for size in sizes)]
    before = run_eval(model, (), calls[0])
    try:
        adaptive.prepare(model, calls[0], flops=0.9999)
    except autogate.AutogateError as error:
        assert re.search("no layer that could choose|runs whole for every image", str(error)), error
        return 0
    assert relative_error(run_eval(model, (), calls[0]), before) == 0
    draw(model, share, seed)
    batches = calls if seed % 2 else None
    fast = adaptive.finalize(copy.deepcopy(model), batches=batches, break_even=1, warn=False)
    for call in calls:
        error = relative_error(run_eval(fast, (), call), run_eval(model, (), call))
        assert error <= TOLERANCE, f"{error:.1e} off for inputs of shape {tuple(call['x'].shape)}"
        assert batches or torch.equal(adaptive.cost(fast), adaptive.cost(model))
    return len(forwards_in(fast))


def draw(model: nn.Module, share: float, seed: int) -> None:
    """Write weights into the saliency modules that close other channels for each image; `share` of them stay on."""
    random = torch.Generator().manual_seed(seed)
    level = torch.distributions.Normal(0.0, 1.0).icdf(torch.tensor(share).clamp(0.001, 0.999))
    with torch.no_grad():
        for module in adaptive.bank(model).saliency_modules:
            module.expand.weight.normal_(0, 0.3, generator=random).div_(module.sharpness)
            module.expand.bias.normal_(float(level) / 2 - 1, 0.5, generator=random).div_(module.sharpness)


def test_networks_skip_exactly():
    counts = over_seeds(check, range(FIRST, FIRST + 4))
    assert FRESH or any(counts)


@pytest.mark.slow
@pytest.mark.parametrize("seeds", chunks(max(100, DRAWS)), ids=str)
def test_many_networks_skip_exactly(seeds: range):
    counts = over_seeds(check, seeds)
    assert FRESH or sum(count > 0 for count in counts) > len(counts) / 2, "networks that skip nothing prove nothing"
