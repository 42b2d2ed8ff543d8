"""Criteria that need no training: one number for each class of channels, computed once.

A criterion is a short function in the file of its family: `magnitudes.py` reads weights, `gradients.py` the loss's
gradients over some batches, `activations.py` what flows through the model, `draws.py` nothing at all. `readings.py` is
what they read, `registry.py` knows them by name, `choosing.py` turns scores into the classes that close.
"""

from autogate.criteria import activations, draws, gradients, magnitudes  # noqa: F401  (they register their criteria)
from autogate.criteria.batches import Batches, twin_of
from autogate.criteria.choosing import Allocation, choose
from autogate.criteria.observing import Call, GatedCalls, Seen
from autogate.criteria.readings import Readings, Slice
from autogate.criteria.registry import CRITERIA, By, Criterion, criterion
from autogate.criteria.scoring import scores_of

__all__ = [
    "CRITERIA",
    "Allocation",
    "Batches",
    "By",
    "Call",
    "Criterion",
    "GatedCalls",
    "Readings",
    "Seen",
    "Slice",
    "choose",
    "criterion",
    "scores_of",
    "twin_of",
]
