"""Random networks, slimmed at random, are saved and loaded."""

import tempfile
from pathlib import Path

import pytest
import torch
from torch import nn

import autogate
from autogate.slim.history import history_of
from autogate.slim.record_replay import (
    AnalysisOptions,
    add_shortcut_convolutions,
    analyse_channels,
    slim_and_record,
)
from rewriters import AutogateError, UndoLog, run_eval
from tests.rewriters.draws import DRAWS, FRESH, chunks, over_seeds
from tests.rewriters.exactness import random_live, zero_kernels
from tests.rewriters.random_networks import Network, Recipe, build


def slim(network: Network, share: float, seed: int) -> None:
    """One slimming to random classes, of each three one with convolutions on the shortcuts, half of them disturbed."""
    model = network.model
    options = AnalysisOptions((network.args, network.kwargs), {}, "conv" if seed % 3 == 0 else "shared")
    shortcuts = add_shortcut_convolutions(model, options, UndoLog()).shortcuts
    generator = torch.Generator().manual_seed(seed)
    for shortcut in shortcuts[seed % 2 :: 2]:
        weight = model.get_parameter(shortcut.weight)
        with torch.no_grad():
            weight.add_(torch.randn(weight.shape, generator=generator, dtype=weight.dtype) / 10)
    analysis = analyse_channels(model, options)
    live = random_live(analysis.channel_map.size, share, seed)
    zero_kernels(model, analysis.channel_map, live)
    slim_and_record(model, analysis, live, options, shortcuts, UndoLog())


def with_other_weights(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    return model


def described(model: nn.Module) -> list[tuple[str, type]]:
    return [(path, type(module)) for path, module in model.named_modules()]


def check_file(recipe: Recipe, share: float, seed: int) -> int:
    """A slim network comes out of a file as it went in; returns how many of its kernels were selected."""
    network = build(recipe)
    slim(network, share, seed)
    if seed % 4 == 0:
        slim(network, 0.7, seed + 1)
    with tempfile.TemporaryDirectory() as folder:
        loaded = saved_and_loaded(network, recipe, Path(folder) / "slim.safetensors")
    assert described(loaded) == described(network.model)
    state = network.model.state_dict()
    assert list(loaded.state_dict()) == list(state)
    assert all(torch.equal(value, state[key]) for key, value in loaded.state_dict().items())
    wanted, got = (run_eval(model, network.args, network.kwargs) for model in (network.model, loaded))
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
    return sum(len(one.selections) for one in history_of(loaded).slimmings)


def saved_and_loaded(network: Network, recipe: Recipe, path: Path) -> nn.Module:
    """The model from a file; built from the recipe, and given inputs only where the error asks for them."""
    autogate.save(network.model, path)
    try:
        return autogate.load(path, with_other_weights(build(recipe).model))
    except AutogateError as error:
        if "example_inputs" not in error.remedy:
            raise
        return autogate.load(path, build(recipe).model, example_inputs=network.args or network.kwargs)


@pytest.mark.parametrize("seeds", chunks(max(12, DRAWS // 10)), ids=str)
def test_random_networks_come_out_of_a_file_as_they_went_in(seeds: range):
    assert any(over_seeds(check_file, seeds)) or FRESH, "no shortcut became a selection"
