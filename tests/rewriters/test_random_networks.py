"""Random networks: whatever channels die, removing them changes nothing.

`pytest` checks networks of stored seeds, `AUTOGATE_DRAWS=3000 pytest` fresh ones (see `tests/rewriters/draws.py`).
"""

from __future__ import annotations

import copy
import re
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from rewriters.analysis import Analysis
from rewriters.analysis.analyse import analyse
from rewriters.forwards import ShapeGuardError
from rewriters.outputs import relative_error, rounding_errors, run_eval
from rewriters.recording import OneNumber, tensors_of
from rewriters.shortcuts.replacing import replace_shortcuts
from rewriters.shortcuts.restoring import restore
from rewriters.slimming.plan import apply, plan
from rewriters.undo_log import UndoLog
from tests.rewriters.draws import DRAWS, FIRST, FRESH, chunks, over_seeds
from tests.rewriters.exactness import (
    TOLERANCE,
    copies_agree,
    place_statistics,
    prunable_share,
    random_live,
    slim,
    zero_kernels,
)
from tests.rewriters.random_networks import (
    Network,
    Recipe,
    build,
    deep_recipe,
    inputs,
    random_recipe,
    recipe_with_ways,
    ways,
)

Call = tuple[tuple[Any, ...], dict[str, Any]]


class Checked(NamedTuple):
    """The share of channels that can be removed, and whether training was compared too."""

    prunable: float
    trained: bool


def check(recipe: Recipe, share: float, seed: int) -> Checked:
    """Everything that is promised of a slim network."""
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
    for batch, more in ((3, 0), (1, 0), (5, 0), (2, 4), (4, 8)):
        if not more or gated.any_size:
            check_other_sizes(gated, network.model, *inputs(recipe, batch, more))
    check_other_options(gated, network)
    # the constant in place of a removed branch isn't trained
    trained = not slimmed.plan.removed and can_be_trained(recipe)
    if trained:
        check_training(recipe, copy.deepcopy(network.model), gated, analysis, live)
    copy.deepcopy(network.model).train()(*network.args, **network.kwargs)
    slimmed.undo_log.undo()
    restored = run_eval(network.model, network.args, network.kwargs)
    assert all(torch.equal(a, b) for a, b in zip(restored, slimmed.wanted, strict=True))
    slimmed.placed.undo()
    assert attribute_names(network.model) == attributes
    return Checked(prunable_share(network.model, analysis.channel_map), trained)


def check_other_options(gated: nn.Module, network: Network) -> None:
    """With other options than the example's, the slim network agrees with the gated one, or says what it misses."""
    for name, value in {"return_maps": not network.kwargs.get("return_maps"), "other": None}.items():
        kwargs = network.kwargs | {name: value}
        try:
            got = run_eval(network.model, network.args, kwargs)
        except ShapeGuardError:
            continue
        error = relative_error(got, run_eval(gated, network.args, kwargs))
        assert error <= TOLERANCE, f"{error:.1e} off with {name}={value}"


def check_other_sizes(gated: nn.Module, slim_model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """The slim network agrees for inputs of another size than the example's."""
    got, wanted = run_eval(slim_model, args, kwargs), run_eval(gated, args, kwargs)
    error = relative_error(got, wanted)
    if error > TOLERANCE:  # an output may be rounding and nothing else, as the mean of what a norm has centred is
        error = relative_error(got, wanted, rounding_errors(gated, args, kwargs))
    assert error <= TOLERANCE, f"{error:.1e} off for inputs of shape {tuple(args[0].shape)}"


def can_be_trained(recipe: Recipe) -> bool:
    """Whether the dense network can: blocks that write in place may spoil what the backward of others needs."""
    args, kwargs = inputs(recipe, batch=3)
    try:
        sum(one.sum() for one in tensors_of(build(recipe).model.train()(*args, **kwargs))).backward()
    except RuntimeError as error:
        return "inplace operation" not in str(error)
    return True


def check_training(recipe: Recipe, slim_model: nn.Module, gated: nn.Module, analysis: Analysis, live: Tensor) -> None:
    """The slim network gives what the gated one gives through three steps of training, in train mode."""
    models = (gated.train(), slim_model.train())
    optimizers = [torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, weight_decay=1e-2) for model in models]
    for step in range(3):
        args, kwargs = inputs(recipe, batch=3 + step)
        outputs = []
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.zero_grad()
            with OneNumber(step):
                found = tensors_of(model(*args, **kwargs))
            torch.stack([one.square().mean().log1p() for one in found]).sum().backward()
            nn.utils.clip_grad_value_(model.parameters(), 1.0)
            optimizer.step()
            outputs.append([one.detach() for one in found])
        zero_kernels(gated, analysis.channel_map, live)
        error = relative_error(outputs[1], outputs[0])
        assert error <= 1e-6, f"{error:.1e} off in step {step} of training"


def attribute_names(model: nn.Module) -> list[set[str]]:
    """What stands in each module, by name."""
    return [{*vars(module), *module._parameters, *module._buffers, *module._modules} for module in model.modules()]


@pytest.mark.parametrize("seeds", chunks(DRAWS), ids=str)
def test_networks_are_slimmed_exactly_and_most_channels_can_be_removed(seeds: range):
    found = over_seeds(check, seeds)
    if not FRESH:
        shares = [one.prunable for one in found]
        assert sum(shares) / len(shares) > 0.4, "networks that are pinned all over prove nothing"
        assert sum(share > 0.1 for share in shares) / len(shares) > 0.8
        assert sum(one.trained for one in found) / len(found) > 0.5, "training was hardly compared"


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(FIRST, FIRST + max(3, DRAWS // 200) if FRESH else 3))
def test_networks_of_hundreds_of_layers_are_slimmed_exactly(seed: int):
    recipe = deep_recipe(seed)
    layers = [module for module in build(recipe).model.modules() if not list(module.children())]
    assert len(layers) > 200
    check(recipe, 0.7, seed)


def check_shortcuts(recipe: Recipe, share: float, seed: int) -> int:
    """As `check`, with convolutions on the shortcuts, half of them disturbed; returns how many there were."""
    network = build(recipe)
    return check_with_shortcuts(network.model, [(network.args, network.kwargs)], [], share, seed)


def check_with_shortcuts(model: nn.Module, examples: list[Call], others: list[Call], share: float, seed: int) -> int:
    """As `check_shortcuts`, for several examples, compared on these and on other calls."""
    attributes = attribute_names(model)
    before = [run_eval(model, *call) for call in examples]
    inserted, (args, kwargs) = UndoLog(), examples[0]
    shortcuts = replace_shortcuts(model, args, kwargs, inserted, others=examples[1:]).shortcuts
    for call, outputs in zip(examples, before, strict=True):
        assert relative_error(run_eval(model, *call), outputs) <= TOLERANCE
    generator = torch.Generator().manual_seed(seed)
    for shortcut in shortcuts[seed % 2 :: 2]:
        weight = model.get_parameter(shortcut.weight)
        with torch.no_grad():
            weight.add_(torch.randn(weight.shape, generator=generator, dtype=weight.dtype) / 10)
    analysis = analyse(model, args, kwargs, others=examples[1:])
    live = random_live(analysis.channel_map.size, share, seed)
    zero_kernels(model, analysis.channel_map, live)
    placed = place_statistics(model, analysis, live)
    calls = [*examples, *others]
    wanted = [run_eval(model, *call) for call in calls]
    slimmed = UndoLog()
    apply(model, restore(model, analysis, plan(model, analysis, live, args, kwargs), shortcuts), slimmed)
    for call, outputs in zip(calls, wanted, strict=True):
        error = relative_error(run_eval(model, *call), outputs)
        assert error <= TOLERANCE, f"{error:.1e} off for {told(call)}"
    copy.deepcopy(model).train()(*args, **kwargs)
    slimmed.undo()
    for call, outputs in zip(calls, wanted, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(run_eval(model, *call), outputs, strict=True))
    placed.undo()
    inserted.undo()
    assert attribute_names(model) == attributes
    return len(shortcuts)


@pytest.mark.parametrize("seeds", chunks(max(10, DRAWS // 6)), ids=str)
def test_networks_with_convolutions_on_their_shortcuts_are_slimmed_exactly(seeds: range):
    counts = over_seeds(check_shortcuts, seeds)
    assert FRESH or sum(count > 0 for count in counts) > len(counts) / 4, "networks without shortcuts prove nothing"


def check_ways(recipe: Recipe, share: float, seed: int) -> float:
    """What is promised of a network that takes several ways, for all of them; returns the share that can be removed.

    It is compared on at least four calls that differ from the examples, with convolutions on the shortcuts or without.
    """
    network = build(recipe)
    examples = ways(recipe, network, batch=2)
    batches = (3, 1) if examples[1:] else (3, 1, 5, 4)
    others = [call for batch in batches for call in ways(recipe, network, batch)]
    if seed % 2:
        check_with_shortcuts(build(recipe).model, examples, others, share, seed)
    (args, kwargs), *more = examples
    analysis = analyse(network.model, args, kwargs, others=more)
    slimmed = slim(network.model, args, kwargs, share=share, seed=seed, analysis=analysis)
    calls = [*examples, *others]
    got = [run_eval(network.model, *call) for call in calls]
    slimmed.undo_log.undo()
    for call, outputs in zip(calls, got, strict=True):
        wanted = run_eval(network.model, *call)
        error = relative_error(outputs, wanted)
        if error > TOLERANCE:  # an output may be rounding and nothing else
            error = relative_error(outputs, wanted, rounding_errors(network.model, *call))
        assert error <= TOLERANCE, f"{error:.1e} off for {told(call)}"
    slimmed.placed.undo()
    return prunable_share(network.model, analysis.channel_map)


def told(call: Call) -> str:
    """The shape and the options of a call."""
    args, kwargs = call
    return f"{tuple(args[0].shape)}, {', '.join(kwargs) or 'no options'}"


@pytest.mark.slow
@pytest.mark.parametrize("seeds", chunks(max(40, DRAWS // 2)), ids=str)
def test_networks_that_take_several_ways_are_slimmed_exactly_in_each(seeds: range):
    shares = over_seeds(check_ways, seeds, recipe_with_ways)
    assert FRESH or sum(shares) / len(shares) > 0.3, "networks that are pinned all over prove nothing"


def test_a_network_that_takes_several_ways_is_slimmed_exactly_in_each():
    assert check_ways(Recipe("image", 1, (("ByMask", 3), ("ByLength", 1)), "pool", "masked"), 0.6, 1) > 0.3


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
