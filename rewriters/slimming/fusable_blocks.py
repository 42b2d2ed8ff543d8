"""Update the width fields of blocks that can fuse their branches into one convolution, which fusing reads."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import nn

from rewriters.recording import modules_of
from rewriters.undo_log import UndoLog

_METHODS = ("reparameterize", "fuse", "switch_to_deploy")
"""Method names under which blocks are fused."""

_READ, _MADE, _GROUPS = ("in_channels", "in_features"), ("out_channels", "out_features"), ("groups",)

_MEANING = {
    "in_chs": _READ, "in_channels": _READ, "in_features": _READ, "dim": _READ,
    "out_chs": _MADE, "out_channels": _MADE, "out_features": _MADE,
    "groups": _GROUPS,
}  # fmt: skip
"""A block's fields, with the fields of the layers in it that mean the same."""

_OF_NORMS = ("num_features",)
"""The field that stands for all of these in a block with norms only."""

Fields = Mapping[nn.Module, Mapping[str, Any]]


def fields_in_fusable_blocks(model: nn.Module) -> Fields:
    """The width fields of all layers in the blocks of a model that can be fused."""
    layers = {layer for block in _blocks(model) for layer in block.modules()}
    names = {*_READ, *_MADE, *_GROUPS, *_OF_NORMS}
    return {layer: {name: vars(layer)[name] for name in names & vars(layer).keys()} for layer in layers}


def update_fusable_blocks(model: nn.Module, before: Fields, undo_log: UndoLog) -> None:
    """Set each field of a block to the new value of the layer field in it that means the same and had the same number.

    Of several layers, the first says what the block reads, and the last says what it computes.

    Args:
        model: its layers have their new fields.
        before: `fields_in_fusable_blocks` of the model before.
        undo_log: notes every change.
    """
    for block in list(_blocks(model)):
        layers = [layer for layer in block.modules() if layer is not block and layer in before]
        for field in _MEANING.keys() & vars(block).keys():
            meaning, old = _MEANING[field], vars(block)[field]
            became = _became(layers, meaning, before, old) or _became(layers, _OF_NORMS, before, old)
            if became:
                undo_log.set_attribute(block, field, became[-1 if meaning is _MADE else 0])


def _blocks(model: nn.Module) -> Iterator[nn.Module]:
    return (module for module in modules_of(model) if _can_fuse(module))


def _can_fuse(module: nn.Module) -> bool:
    cls: type = type(module)
    return _class_can_fuse(cls) or any(name in module.__dict__ or name in module._modules for name in _METHODS)


@functools.cache
def _class_can_fuse(cls: type) -> bool:
    return any(hasattr(cls, name) for name in _METHODS)


def _became(layers: Iterable[nn.Module], names: Iterable[str], before: Fields, old: Any) -> list[Any]:
    """The new values of those layer fields that had the number `old`, in order."""
    known = type(old) is int
    return [vars(layer)[name] for layer in layers for name in names if known and before[layer].get(name) == old]
