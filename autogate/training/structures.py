"""The channels of the subnets of a run: found by runs with gates, or at once by a criterion, and kept in its folder.

A run with gates for each share has a folder of its own within the run's. So a run that is stopped while it looks for
channels goes on where it was, and its structures are the same, bit for bit.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import nn

from autogate import subnets
from autogate.api import gates
from autogate.gating import BANK
from autogate.training.checkpoint import load_newest
from autogate.training.distributed import World
from autogate.training.network import ModelFunction, build_network, with_gates
from autogate.training.recipe import Recipe, Widths
from autogate.training.run_folder import RunFolder, RunInfo
from rewriters import AutogateError

Run = Callable[[Recipe, RunFolder, bool], bool]
"""Starts a run with gates in a folder, or resumes it (the last argument). Returns whether it came to its end."""


def find_structures(
    info: RunInfo, folder: RunFolder, world: World, model: nn.Module, function: ModelFunction | None, run: Run
) -> tuple[subnets.Structure, ...] | None:
    """The channels of each subnet: those in the run's folder, or found now and written there.

    Args:
        info: of the run.
        folder: of the run.
        world: the processes.
        model: the dense model, with its weights where a criterion is to look at them.
        function: as for `start`.
        run: what trains with gates.

    Returns:
        None if the run was stopped meanwhile.
    """
    structures, widths = folder.structures(), info.recipe.subnets
    assert widths is not None
    if structures:
        return structures
    found = _by_training(info, folder, world, function, run) if widths.by is None else _by_criterion(info, model)
    if found is not None and world.main:
        folder.write_structures(found.structures)
    world.wait()
    return None if found is None else found.structures


def _by_criterion(info: RunInfo, model: nn.Module) -> subnets.Found:
    """All at once: weights alone are looked at."""
    recipe, budget = info.recipe, info.recipe.budget
    assert recipe.subnets is not None and recipe.subnets.by is not None
    example = torch.randn(2, *info.input_size, device=next(model.parameters()).device)
    return subnets.find(
        model, example, flops=recipe.subnets.shares, by=recipe.subnets.by, round_to=budget.round_to,
        shortcuts=budget.shortcuts, ignore=budget.ignore, limits=budget.limits,
    )  # fmt: skip


def _by_training(
    info: RunInfo, folder: RunFolder, world: World, function: ModelFunction | None, run: Run
) -> subnets.Found | None:
    """One run with gates after the other."""
    recipe, taken = info.recipe, []
    assert recipe.subnets is not None
    for share in recipe.subnets.shares:
        own = folder.of_share(share)
        resumed = own.checkpoint_file.is_file()
        if world.main and not resumed and own.path.exists():
            shutil.rmtree(own.path)  # killed before its first checkpoint
        world.wait()
        asked = replace(recipe, subnets=None, budget=replace(recipe.budget, flops=share))
        if not run(asked, own, resumed):
            return None
        taken.append(_gated(own, function))
    return subnets.of(*taken, names=[f"{share:g}" for share in recipe.subnets.shares])


def _gated(folder: RunFolder, function: ModelFunction | None) -> nn.Module:
    """The model of a run with gates, with the gates that it had at its end."""
    found, file = load_newest(folder.checkpoint_file)
    info, recipe = found.info, found.info.recipe
    model = build_network(recipe.network, info.num_classes, weights=False, function=function)
    model = with_gates(model, recipe.budget, info.input_size, info.steps, info.steps_per_epoch, recipe.method)
    prefix = f"{BANK}."
    own = {name.removeprefix(prefix): value for name, value in found.model.items() if name.startswith(prefix)}
    try:
        gates(model).load_state_dict(own if found.gates is None else found.gates)
    except RuntimeError as error:
        raise AutogateError(f"its gates don't fit its model: {error}", where=str(file)) from error
    return model


def check_widths(recipe: Recipe, widths: Widths) -> None:
    """Raise if a recipe asks for what a run of several widths can't do."""
    budget = recipe.budget
    if any(share is not None for share in (budget.flops, budget.params, budget.activations, budget.latency)):
        raise AutogateError(
            "the subnets' shares are of the FLOPs, and another budget is given.",
            where="subnets",
            remedy=f"Leave it out: {', '.join(f'{share:g}' for share in widths.shares)} of the FLOPs is the budget.",
        )
