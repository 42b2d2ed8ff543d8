"""Widths that a timm model keeps beside its layers, for `reset_classifier` and its like."""

from __future__ import annotations

from torch import nn

from rewriters import Journal

_FIELDS = ("num_features", "head_hidden_size", "in_features")


def widths(model: nn.Module) -> int | None:
    """Input features of the classifier, None where the model has none to be asked for."""
    classifier = model.get_classifier() if hasattr(model, "get_classifier") else None
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
    for module in (model, getattr(model, "head", None)):
        for field in _FIELDS if isinstance(module, nn.Module) and not isinstance(module, nn.Linear) else ():
            if module.__dict__.get(field) == before:
                journal.set_attribute(module, field, after)
