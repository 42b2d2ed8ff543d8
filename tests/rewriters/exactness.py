"""The claim about every network: removing dead channels changes no output."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rewriters.analysis import Analysis, analyse
from rewriters.cross_channel.installing import write_live
from rewriters.labelling.channel_map import ChannelMap
from rewriters.outputs import relative_error, run_eval
from rewriters.slimming.plan import SlimPlan, apply, plan
from rewriters.undo_log import UndoLog

TOLERANCE = 1e-9
"""For networks in float64; the law asks for 1e-5 in float32."""


@dataclass(frozen=True)
class Slimmed:
    """A model that was slimmed, with all that led there; `placed` is what let its statistics be live ones."""

    model: nn.Module
    analysis: Analysis
    plan: SlimPlan
    undo_log: UndoLog
    placed: UndoLog
    wanted: list[Tensor]
    got: list[Tensor]

    @property
    def error(self) -> float:
        return relative_error(self.got, self.wanted)


def random_live(size: int, share: float, seed: int) -> Tensor:
    """A pattern in which `share` of the classes live, bool of shape (size,)."""
    return torch.rand(size, generator=torch.Generator().manual_seed(seed)) < share


def zero_kernels(model: nn.Module, channel_map: ChannelMap, live: Tensor) -> None:
    """Set to zero what a gate at zero would: the dead classes' part of every kernel that sums over them."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for side in channel_map.gated:
        dead = ~torch.cat([live, torch.ones(1, dtype=torch.bool)])[channel_map.classes[side]]
        with torch.no_grad():
            parameters[side.tensor].index_fill_(side.dim, dead.nonzero().flatten(), 0.0)


def place_statistics(model: nn.Module, analysis: Analysis, live: Tensor) -> UndoLog:
    """Let norms look at the live channels only, as they do while gates train; returns how to take that back."""
    undo_log = UndoLog()
    analysis.place_statistics(model, undo_log)
    write_live(model, analysis.channel_map, live)
    return undo_log


def slim(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None = None,
    *,
    share: float = 0.5,
    seed: int = 0,
    analysis: Analysis | None = None,
) -> Slimmed:
    """Analyse a model, let a random pattern of classes die, take them out."""
    kwargs = kwargs or {}
    analysis = analysis or analyse(model, args, kwargs)
    live = random_live(analysis.channel_map.size, share, seed)
    zero_kernels(model, analysis.channel_map, live)
    placed = place_statistics(model, analysis, live)
    wanted = run_eval(model, args, kwargs)
    slim_plan, undo_log = plan(model, analysis, live, args, kwargs), UndoLog()
    apply(model, slim_plan, undo_log)
    return Slimmed(model, analysis, slim_plan, undo_log, placed, wanted, run_eval(model, args, kwargs))


def prunable_share(model: nn.Module, channel_map: ChannelMap) -> float:
    """Share of the kernels' output channels that may die (1.0 is never reached: outputs stay)."""
    sides = {kernel.output_side for kernel in channel_map.kernels}
    total = sum(channel_map.sizes[side] for side in sides)
    free = sum(int((channel_map.classes[side] >= 0).sum()) for side in sides if side in channel_map.classes)
    return free / total if total else 0.0


def assert_exact(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None = None, **options
) -> Slimmed:
    """Exact with different shares of channels dead, and as before when the slimming is undone."""
    analysis = None
    for share, seed in ((0.9, 0), (0.6, 1), (0.6, 2), (0.2, 3), (0.0, 4)):
        trial = copy.deepcopy(model)
        slimmed = slim(trial, args, kwargs, share=share, seed=seed, analysis=analysis, **options)
        analysis = slimmed.analysis
        assert slimmed.error <= TOLERANCE, f"{slimmed.error:.1e} off with {share:.0%} of the channels live"
        slimmed.undo_log.undo()
        assert all(torch.equal(a, b) for a, b in zip(run_eval(trial, args, kwargs), slimmed.wanted, strict=True))
    return slimmed


def copies_agree(slimmed: Slimmed, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether a deep copy and a pickled copy of the slim model give what it gives."""
    copied = copy.deepcopy(slimmed.model)
    loaded = pickle.loads(pickle.dumps(slimmed.model))
    return all(
        torch.equal(a, b)
        for other in (copied, loaded)
        for a, b in zip(run_eval(other, args, kwargs), slimmed.got, strict=True)
    )
