"""Choose prototypes for the stages of a model on images, and tell how it agrees with the model before."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from autogate.inputs import Inputs
from autogate.saliency import SaliencyBank, costs
from autogate.skipping.prototypes import Prototypes, chosen
from autogate.skipping.stages import Stage, StageForward, maps_in, stages_in
from rewriters import AutogateError, UndoLog
from rewriters.recording import tensors_of

GROUPING = "grouping"
"""Name of the saliency bank's attribute that has the model's `Grouping`."""


@dataclass(frozen=True)
class Grouping:
    """How a model runs images in groups, and how it agrees with itself when each image has a code of its own.

    Attributes:
        stages: paths of the modules that run images in groups, each with the number of its prototypes.
        images: that were compared.
        kept: the share of the channels used by images that their prototypes have.
        same: the share of images, or of positions, whose largest output is the same; NaN for outputs of one number.
        own_cost: the share of the FLOPs that these images take with codes of their own.
        cost: the share that they take with prototypes, in the batches that were given.
    """

    stages: tuple[tuple[str, int], ...]
    images: int
    kept: float
    same: float
    own_cost: float
    cost: float

    def __str__(self) -> str:
        stages = ", ".join(f"{path} ({count})" for path, count in self.stages)
        return (
            f"prototypes of {stages}. On {self.images} images they have {self.kept:.1%} of the channels used, the "
            f"largest output is the same for {self.same:.1%}, FLOPs {self.own_cost:.1%} -> {self.cost:.1%}"
        )


@dataclass(frozen=True, eq=False)
class _Seen:
    """What calibration images do: codes by layer, descriptors by stage, outputs, and their shares of the FLOPs."""

    codes: dict[int, Tensor]
    descriptors: dict[str, Tensor]
    outputs: list[Tensor]
    shares: Tensor


def group(
    model: nn.Module, bank: SaliencyBank, call: Inputs, batches: Iterable[Any], count: int, undo_log: UndoLog
) -> Grouping:
    """Give the stages of a model prototypes.

    Args:
        model: finalized; changed in place.
        bank: its saliency bank.
        call: example inputs.
        batches: calibration images; run over twice.
        count: of prototypes a stage.
        undo_log: takes all changes.

    Raises:
        AutogateError: no module of the model can run images in groups, or there are no batches.
    """
    batches = list(batches) if iter(batches) is batches else batches
    stages = stages_in(model, bank.counting.layers, maps_in(model, call))
    if not stages:
        raise AutogateError(
            "none of its modules takes one feature map, returns one, and has two layers that choose.",
            where=type(model).__name__,
            remedy="Finalize it without prototypes: each image keeps the code of its own.",
        )
    before = _seen(model, bank, batches, stages)
    forwards: list[tuple[Stage, Prototypes]] = []
    for stage in stages:
        codes = {layer: before.codes[layer] for layer in stage.layers if layer in before.codes}
        found = chosen(codes, before.descriptors[stage.path], count)
        forwards.append((stage, found))
        module = model.get_submodule(stage.path)
        undo_log.set_attribute(module, "forward", StageForward(module, bank.notes, found, stage.layout))
    after = _seen(model, bank, batches, stages)
    grouping = Grouping(
        tuple((stage.path, len(found)) for stage, found in forwards), len(before.shares), _kept(forwards, before),
        _same(before.outputs, after.outputs), float(before.shares.mean()), float(after.shares.mean()),
    )  # fmt: skip
    undo_log.set_attribute(bank, GROUPING, grouping)
    undo_log.set_attribute(bank, "measured", None)  # that was without prototypes
    return grouping


def ungroup(model: nn.Module, bank: SaliencyBank, undo_log: UndoLog) -> None:
    """Take the prototypes off again."""
    for module in model.modules():
        forward = module.__dict__.get("forward")
        if isinstance(forward, StageForward):
            if forward.earlier is None:
                undo_log.remove(module.__dict__, "forward")
            else:
                undo_log.set_attribute(module, "forward", forward.earlier)
    undo_log.set_attribute(bank, GROUPING, None)


def grouping_of(bank: SaliencyBank) -> Grouping | None:
    """How a model runs images in groups; None if each image has a code of its own."""
    return bank.__dict__.get(GROUPING)


def _seen(model: nn.Module, bank: SaliencyBank, batches: Iterable[Any], stages: list[Stage]) -> _Seen:
    codes: dict[int, list[Tensor]] = {}
    descriptors: dict[str, list[Tensor]] = {stage.path: [] for stage in stages}
    outputs: list[Tensor] = []
    shares = []
    handles = [model.register_forward_hook(lambda module, args, output: outputs.append(tensors_of(output)[0].cpu()))]
    for stage in stages:

        def note(module: nn.Module, args: Any, stage: Stage = stage) -> None:
            descriptors[stage.path].append(stage.layout.means(args[0]).cpu())

        handles.append(model.get_submodule(stage.path).register_forward_pre_hook(note))
    try:
        for cost in costs(model, bank, batches):
            shares.append((cost.images / cost.dense).cpu())
            for layer, made in _codes(bank, len(cost.images)).items():
                codes.setdefault(layer, []).append(made)
    finally:
        for handle in handles:
            handle.remove()
    joined = {layer: torch.cat(found) for layer, found in codes.items()}
    return _Seen(joined, {path: torch.cat(found) for path, found in descriptors.items()}, outputs, torch.cat(shares))


def _codes(bank: SaliencyBank, images: int) -> dict[int, Tensor]:
    """The channels that each image uses in the latest forward, by layer; layers that see other rows are left out."""
    found: dict[int, Tensor] = {}
    for call in bank.notes.calls:
        if call.made is not None and len(call.made) == images:
            made = call.made.cpu()
            found[call.layer] = found[call.layer] | made if call.layer in found else made
    return found


def _kept(forwards: list[tuple[Stage, Prototypes]], seen: _Seen) -> float:
    used = kept = 0.0
    for stage, prototypes in forwards:
        of = prototypes.of(seen.descriptors[stage.path])
        for layer, code in prototypes.codes.items():
            used += float(seen.codes[layer].sum())
            kept += float((seen.codes[layer] & code[of]).sum())
    return kept / used if used else 1.0


def _same(before: list[Tensor], after: list[Tensor]) -> float:
    equal = [one.argmax(1) == other.argmax(1) for one, other in zip(before, after, strict=True)
             if one.ndim > 1 and one.shape[1] > 1]  # fmt: skip
    return float(torch.cat([one.flatten() for one in equal]).float().mean()) if equal else float("nan")
