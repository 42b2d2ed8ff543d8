"""Random networks for what nobody thought of: whatever channels die, taking them out changes nothing.

`AUTOGATE_DRAWS` sets how many networks are drawn (by default as many as take about a minute).
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from typing import Any

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from rewriters.analysis.analyse import analyse
from rewriters.shortcuts.replacing import replace_shortcuts
from rewriters.shortcuts.restoring import restore
from rewriters.slimming.plan import apply, plan
from rewriters.undo_log import UndoLog
from rewriters.verify import relative_error, rounding_errors, run_eval
from tests.rewriters.exactness import (
    TOLERANCE,
    copies_agree,
    place_statistics,
    prunable_share,
    random_live,
    share_for,
    slim,
    zero_kernels,
)
from tests.rewriters.random_networks import Network, Recipe, build, inputs, random_recipe, recipes

DRAWS = int(os.environ.get("AUTOGATE_DRAWS", "120"))


def check(recipe: Recipe, share: float, seed: int) -> float:
    """Everything a slim network must hold to; returns the share of channels that could have died."""
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
        if more and recipe.head == "views":
            continue  # a reshape to literal sizes makes of a larger image a larger batch
        args, kwargs = inputs(recipe, batch, more)
        check_other_sizes(gated, network.model, args, kwargs)
    copy.deepcopy(network.model).train()(*network.args, **network.kwargs)
    slimmed.undo_log.undo()
    restored = run_eval(network.model, network.args, network.kwargs)
    assert all(torch.equal(a, b) for a, b in zip(restored, slimmed.wanted, strict=True))
    slimmed.placed.undo()
    assert attribute_names(network.model) == attributes
    return prunable_share(network.model, analysis.channel_map)


def check_other_sizes(gated: nn.Module, slim_model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Where the network takes inputs of another size, the slim one does and agrees."""
    try:
        wanted = run_eval(gated, args, kwargs)
    except (RuntimeError, ValueError):
        return
    got = run_eval(slim_model, args, kwargs)
    error = relative_error(got, wanted)
    if error > TOLERANCE:  # an output may be rounding and nothing else, as the mean of what a norm has centred is
        error = relative_error(got, wanted, rounding_errors(gated, args, kwargs))
    assert error <= TOLERANCE, f"{error:.1e} off for inputs of shape {tuple(args[0].shape)}"


def attribute_names(model: nn.Module) -> list[set[str]]:
    """What stands in each module, by name."""
    return [{*vars(module), *module._parameters, *module._buffers, *module._modules} for module in model.modules()]


@settings(max_examples=DRAWS // 2, deadline=None, suppress_health_check=list(HealthCheck))
@given(recipe=recipes(), share=st.sampled_from([0.9, 0.6, 0.2, 0.0]), seed=st.integers(0, 99))
def test_any_network_is_slimmed_exactly(recipe: Recipe, share: float, seed: int):
    check(recipe, share, seed)


def over_seeds(one: Callable[[Recipe, float, int], Any], count: int) -> list[Any]:
    """What a check gives for each of the first `count` seeds; a failure names its seed and recipe."""
    results = []
    for seed in range(count):
        recipe = random_recipe(seed)
        try:
            results.append(one(recipe, share_for(seed), seed))
        except Exception as error:
            raise AssertionError(f"seed {seed}, {recipe}: {error}") from error
    return results


def test_seeded_networks_are_slimmed_exactly_and_most_channels_may_go():
    shares = over_seeds(check, DRAWS // 2)
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


def test_seeded_networks_with_convolutions_on_their_shortcuts():
    replaced = over_seeds(check_shortcuts, DRAWS // 6)
    assert sum(count > 0 for count in replaced) > len(replaced) / 4, "networks without shortcuts prove nothing"


def test_recipe_says_all():
    first, second = build(random_recipe(7)), build(random_recipe(7))
    assert isinstance(first, Network)
    assert all(torch.equal(a, b) for a, b in zip(first.args, second.args, strict=True))
    outputs = [run_eval(network.model, network.args, network.kwargs) for network in (first, second)]
    assert all(torch.equal(a, b) for a, b in zip(*outputs, strict=True))
