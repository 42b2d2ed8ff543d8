"""What a file says of a model that skips, and how it is made to skip again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import isnan, nan

import torch
from torch import Tensor, nn

from autogate.saliency import SaliencyBank
from autogate.skipping.break_even import BreakEven
from autogate.skipping.finalizing import with_forwards
from autogate.skipping.forwards import SkippingForward
from autogate.skipping.grouping import GROUPING, Grouping, grouping_of
from autogate.skipping.pooling import PoolingForward
from autogate.skipping.prototypes import Prototypes
from autogate.skipping.stages import StageForward, first_in
from autogate.slim import check_same
from rewriters import UndoLog

UNKNOWN = -1.0
"""In place of a NaN, which JSON lacks."""


@dataclass(frozen=True)
class RecordedCodes:
    """The channels of a layer that each prototype has: of `layer`, its number, the indices that are on."""

    layer: int
    on: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class RecordedStage:
    """A module that runs images in groups, with its `Prototypes`."""

    path: str
    codes: tuple[RecordedCodes, ...]
    weight: tuple[tuple[float, ...], ...]
    bias: tuple[float, ...]


@dataclass(frozen=True)
class Skipping:
    """How a model skips, as plain data.

    Attributes:
        break_even: of each module that skips, by its path.
        stages: the modules that run images in groups.
        grouping: how these agree with the model before; None if there are none. `same` is `UNKNOWN` for NaN.
    """

    break_even: Mapping[str, BreakEven]
    stages: tuple[RecordedStage, ...] = ()
    grouping: Grouping | None = None


def record_of_skipping(model: nn.Module, bank: SaliencyBank) -> Skipping | None:
    """How a model skips; None if it isn't finalized."""
    found: dict[str, BreakEven] = {}
    stages: list[RecordedStage] = []
    skips = False
    for path, module in model.named_modules():
        forward = module.__dict__.get("forward")
        if isinstance(forward, StageForward):
            stages.append(_recorded(path, forward.prototypes))
            forward = forward.earlier
        if isinstance(forward, (SkippingForward, PoolingForward)):
            skips = True
            if forward.break_even is not None:
                found[path] = forward.break_even
    grouping = grouping_of(bank)
    if grouping is not None and isnan(grouping.same):
        grouping = replace(grouping, same=UNKNOWN)
    return Skipping(found, tuple(stages), grouping) if skips else None


def skip_again(model: nn.Module, bank: SaliencyBank, record: Skipping, undo_log: UndoLog) -> None:
    """Make a model skip as a record says. Nothing is measured or run.

    Args:
        model: like the one that skipped, with its saliency modules.
        bank: its saliency bank.
        record: the record.
        undo_log: takes all changes.

    Raises:
        AutogateError: a module of the record can't skip in this model.
    """
    able = with_forwards(model, bank, undo_log)
    check_same("the set of modules that skip", sorted(set(able) & set(record.break_even)), sorted(record.break_even))
    for path, break_even in record.break_even.items():
        able[path].break_even = break_even
    sizes = {module.layer: module.expand.out_features for module in bank.saliency_modules}
    for stage in record.stages:
        module, prototypes = model.get_submodule(stage.path), _prototypes(stage, sizes)
        _, layout = first_in(model, stage.path, bank.counting.layers)
        undo_log.set_attribute(module, "forward", StageForward(module, bank.notes, prototypes, layout))
    grouping = record.grouping
    if grouping is not None and grouping.same == UNKNOWN:
        grouping = replace(grouping, same=nan)
    undo_log.set_attribute(bank, GROUPING, grouping)


def _recorded(path: str, prototypes: Prototypes) -> RecordedStage:
    codes = tuple(
        RecordedCodes(layer, tuple(tuple(torch.nonzero(row).flatten().tolist()) for row in code))
        for layer, code in prototypes.codes.items()
    )
    weight = tuple(map(tuple, prototypes.weight.tolist()))
    return RecordedStage(path, codes, weight, tuple(prototypes.bias.tolist()))


def _prototypes(stage: RecordedStage, sizes: Mapping[int, int]) -> Prototypes:
    codes: dict[int, Tensor] = {}
    for one in stage.codes:
        check_same(f"the number of prototypes of {stage.path}", len(one.on), len(stage.bias))
        codes[one.layer] = torch.zeros(len(one.on), sizes[one.layer], dtype=torch.bool)
        for row, on in zip(codes[one.layer], one.on, strict=True):
            row[list(on)] = True
    check_same(f"the number of prototypes of {stage.path}", len(stage.weight), len(stage.bias))
    return Prototypes(codes, torch.tensor(stage.weight), torch.tensor(stage.bias))
