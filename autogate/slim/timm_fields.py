"""Widths that a timm model stores besides its layers, which `reset_classifier` and others read."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from rewriters import UndoLog

_FIELDS = ("num_features", "head_hidden_size", "in_features", "embed_dim")

_HEADS = ("conv_head", "pre_logits", "head")
"""Names of modules that may hold layers between the features and the classifier."""


@dataclass(frozen=True)
class Widths:
    """Input features of the classifier, and of the whole head, which may have other layers before the classifier."""

    classifier: int | None
    head: int | None


def widths(model: nn.Module) -> Widths:
    """The widths that the layers have; None for a layer that doesn't exist."""
    heads = (getattr(model, name, None) for name in _HEADS)
    layers = (layer for head in heads if isinstance(head, nn.Module) for layer in head.modules())
    return Widths(_inputs(_classifier(model)), next((_inputs(layer) for layer in layers if _inputs(layer)), None))


def _classifier(model: nn.Module) -> object:
    """What the model returns as its classifier; None if it can't, as when its head was fused into one layer."""
    get_classifier = getattr(model, "get_classifier", None)
    try:
        return get_classifier() if callable(get_classifier) else None
    except AttributeError:
        return None


def _inputs(layer: object) -> int | None:
    if isinstance(layer, nn.Linear):
        return layer.in_features
    if isinstance(layer, nn.modules.conv._ConvNd):
        return layer.in_channels
    return None


def update(model: nn.Module, before: Widths, undo_log: UndoLog) -> None:
    """Update the fields that held one of the widths before to the width that it is now."""
    after = widths(model)
    keepers = [module for module in (model, getattr(model, "head", None)) if isinstance(module, nn.Module)]
    for module in keepers:
        for field in () if isinstance(module, nn.Linear) else _FIELDS:
            named = module.__dict__.get(field)
            for old, new in ((before.classifier, after.classifier), (before.head, after.head)):
                if named is not None and named == old and new is not None:
                    if new != old:
                        undo_log.set_attribute(module, field, new)
                    break
