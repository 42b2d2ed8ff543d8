"""A choice of channels for each image. In: a model. Out: the same model, whose convolutions score their channels."""

from autogate.saliency.bank import SALIENCY, SaliencyBank, check_not_adaptive, saliency_of
from autogate.saliency.installing import install, install_again
from autogate.saliency.method import SANP
from autogate.saliency.observing import LayerUse, MeanUse, Use, known_use, meet, use_of
from autogate.saliency.record import Choosing, record_of
from autogate.saliency.run import Run

__all__ = [
    "SALIENCY",
    "SANP",
    "Choosing",
    "LayerUse",
    "MeanUse",
    "Run",
    "SaliencyBank",
    "Use",
    "check_not_adaptive",
    "install",
    "install_again",
    "known_use",
    "meet",
    "record_of",
    "saliency_of",
    "use_of",
]
