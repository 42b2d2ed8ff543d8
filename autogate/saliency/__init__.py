"""A choice of channels for each image. In: a model. Out: the same model, whose layers score their channels."""

from autogate.saliency.bank import SALIENCY, SaliencyBank, check_not_adaptive, saliency_of
from autogate.saliency.counting import CountedLayer, Counting, Note, Notes
from autogate.saliency.installing import install, install_again
from autogate.saliency.kinds import classes_of
from autogate.saliency.layout import Layout, layout_of
from autogate.saliency.method import SANP
from autogate.saliency.module import NAME, FollowingModule, SaliencyModule
from autogate.saliency.observing import LayerUse, MeanUse, Use, costs, known_use, meet, use_of
from autogate.saliency.record import Choosing, record_of
from autogate.saliency.run import Run
from autogate.saliency.sites import Scaling
from autogate.saliency.zeros import nonzero_when_off

__all__ = [
    "NAME",
    "SALIENCY",
    "SANP",
    "Choosing",
    "CountedLayer",
    "Counting",
    "FollowingModule",
    "LayerUse",
    "Layout",
    "MeanUse",
    "Note",
    "Notes",
    "Run",
    "SaliencyBank",
    "SaliencyModule",
    "Scaling",
    "Use",
    "check_not_adaptive",
    "classes_of",
    "costs",
    "install",
    "install_again",
    "known_use",
    "layout_of",
    "meet",
    "nonzero_when_off",
    "record_of",
    "saliency_of",
    "use_of",
]
