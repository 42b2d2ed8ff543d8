"""Random networks: whatever channels die, removing them changes nothing.

`pytest` checks networks of stored seeds, `AUTOGATE_DRAWS=3000 pytest` fresh ones (see `tests/rewriters/draws.py`).
"""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
from torch import nn

from rewriters.analysis.analyse import analyse
from rewriters.outputs import relative_error, rounding_errors, run_eval
from rewriters.shortcuts.replacing import replace_shortcuts
from rewriters.shortcuts.restoring import restore
from rewriters.slimming.plan import apply, plan
from rewriters.undo_log import UndoLog
from tests.rewriters.draws import DRAWS, FRESH, chunks, over_seeds
from tests.rewriters.exactness import (
    TOLERANCE,
    copies_agree,
    place_statistics,
    prunable_share,
    random_live,
    slim,
    zero_kernels,
)
from tests.rewriters.random_networks import Network, Recipe, build, inputs, random_recipe


def check(recipe: Recipe, share: float, seed: int) -> float:
    """Everything that is promised of a slim network; returns the share of channels that can be removed."""
    network = build(recipe)
    attributes = attribute_names(network.model)
    analysis = analyse(network.model, network.args, network.kwargs)
    assert attribute_names(network.model) == attributes, "the analysis left something behind"
    slimmed = slim(network.model, network.args, network.kwargs, share=share, seed=seed, analysis=analysis)
    assert slimmed.error <= TOLERANCE, f"{slimmed.error:.1e} off"
    assert copies_agree(slimmed, network.args, network.kwargs)
    gated = build(recipe).model
    live = random_live(analysis.channel_map.size, share, seed)
    zero_kernels(gated, analysis.channel_map, live)
    place_statistics(gated, analysis, live)
    for batch, more in ((3, 0), (1, 0), (2, 4)):
        if not more or gated.any_size:
            check_other_sizes(gated, network.model, *inputs(recipe, batch, more))
    copy.deepcopy(network.model).train()(*network.args, **network.kwargs)
    slimmed.undo_log.undo()
    restored = run_eval(network.model, network.args, network.kwargs)
    assert all(torch.equal(a, b) for a, b in zip(restored, slimmed.wanted, strict=True))
    slimmed.placed.undo()
    assert attribute_names(network.model) == attributes
    return prunable_share(network.model, analysis.channel_map)


def check_other_sizes(gated: nn.Module, slim_model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """The slim network agrees for inputs of another size than the example's."""
    got, wanted = run_eval(slim_model, args, kwargs), run_eval(gated, args, kwargs)
    error = relative_error(got, wanted)
    if error > TOLERANCE:  # an output may be rounding and nothing else, as the mean of what a norm has centred is
        error = relative_error(got, wanted, rounding_errors(gated, args, kwargs))
    assert error <= TOLERANCE, f"{error:.1e} off for inputs of shape {tuple(args[0].shape)}"


def attribute_names(model: nn.Module) -> list[set[str]]:
    """What stands in each module, by name."""
    return [{*vars(module), *module._parameters, *module._buffers, *module._modules} for module in model.modules()]


@pytest.mark.parametrize("seeds", chunks(DRAWS), ids=str)
def test_networks_are_slimmed_exactly_and_most_channels_can_be_removed(seeds: range):
    shares = over_seeds(check, seeds)
    if not FRESH:
        assert sum(shares) / len(shares) > 0.4, "networks that are pinned all over prove nothing"
        assert sum(share > 0.1 for share in shares) / len(shares) > 0.8


def check_shortcuts(recipe: Recipe, share: float, seed: int) -> int:
    """As `check`, with convolutions on the shortcuts, half of them disturbed; returns how many there were."""
    network = build(recipe)
    model, args, kwargs = network.model, network.args, network.kwargs
    attributes = attribute_names(model)
    before = run_eval(model, args, kwargs)
    inserted = UndoLog()
    shortcuts = replace_shortcuts(model, args, kwargs, inserted)
    assert relative_error(run_eval(model, args, kwargs), before) <= TOLERANCE
    generator = torch.Generator().manual_seed(seed)
    for shortcut in shortcuts[seed % 2 :: 2]:
        weight = model.get_parameter(shortcut.weight)
        with torch.no_grad():
            weight.add_(torch.randn(weight.shape, generator=generator, dtype=weight.dtype) / 10)
    analysis = analyse(model, args, kwargs)
    live = random_live(analysis.channel_map.size, share, seed)
    zero_kernels(model, analysis.channel_map, live)
    placed = place_statistics(model, analysis, live)
    wanted = run_eval(model, args, kwargs)
    slimmed = UndoLog()
    apply(model, restore(model, analysis, plan(model, analysis, live, args, kwargs), shortcuts), slimmed)
    error = relative_error(run_eval(model, args, kwargs), wanted)
    assert error <= TOLERANCE, f"{error:.1e} off"
    copy.deepcopy(model).train()(*args, **kwargs)
    slimmed.undo()
    assert all(torch.equal(a, b) for a, b in zip(run_eval(model, args, kwargs), wanted, strict=True))
    placed.undo()
    inserted.undo()
    assert attribute_names(model) == attributes
    return len(shortcuts)


@pytest.mark.parametrize("seeds", chunks(max(20, DRAWS // 6)), ids=str)
def test_networks_with_convolutions_on_their_shortcuts_are_slimmed_exactly(seeds: range):
    counts = over_seeds(check_shortcuts, seeds)
    assert FRESH or sum(count > 0 for count in counts) > len(counts) / 4, "networks without shortcuts prove nothing"


def fails_on_attention(recipe: Recipe, share: float, seed: int) -> None:
    assert not any(name == "Attention" for name, _ in recipe.blocks), "no attention, please"


def test_a_failing_draw_prints_the_smallest_recipe_that_fails_as_a_test():
    with pytest.raises(AssertionError, match="no attention, please") as failure:
        over_seeds(fails_on_attention, range(100))
    printed = str(failure.value)
    defined: dict[str, Any] = {}
    exec(printed[printed.index("from tests.") :], defined)
    with pytest.raises(AssertionError, match="no attention, please"):
        defined["test_a_draw_that_failed"]()
    assert len(re.findall(r"\('\w+', \d+\)", printed)) == 1, "one block is enough"


def test_recipe_says_all():
    first, second = build(random_recipe(7)), build(random_recipe(7))
    assert isinstance(first, Network)
    assert all(torch.equal(a, b) for a, b in zip(first.args, second.args, strict=True))
    outputs = [run_eval(network.model, network.args, network.kwargs) for network in (first, second)]
    assert all(torch.equal(a, b) for a, b in zip(*outputs, strict=True))
