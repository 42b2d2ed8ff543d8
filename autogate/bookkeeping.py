"""Widths that a timm model keeps beside its layers, for `reset_classifier` and its like."""

from __future__ import annotations

from torch import nn

from rewriters import Journal

_FIELDS = ("num_features", "head_hidden_size", "in_features", "embed_dim")


def widths(model: nn.Module) -> int | None:
    """Input features of the classifier, None where the model has none to be asked for."""
    get_classifier = getattr(model, "get_classifier", None)
    classifier = get_classifier() if callable(get_classifier) else None
    if isinstance(classifier, nn.Linear):
        return classifier.in_features
    if isinstance(classifier, nn.modules.conv._ConvNd):
        return classifier.in_channels
    return None


def update(model: nn.Module, before: int | None, journal: Journal) -> None:
    """Let the widths that named the classifier's inputs name what they are now."""
    after = widths(model)
    if before is None or after is None or before == after:
        return
    keepers = [module for module in (model, getattr(model, "head", None)) if isinstance(module, nn.Module)]
    for module in keepers:
        for field in () if isinstance(module, nn.Linear) else _FIELDS:
            if module.__dict__.get(field) == before:
                journal.set_attribute(module, field, after)
