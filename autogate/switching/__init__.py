"""Several widths in one network. In: a model and structures. Out: the same model, which can be switched."""

from autogate.switching.bank import SUBNETS, Subnets, check_one_width, form_of, subnets_of
from autogate.switching.fusing import FULL, extract, fuse, fuse_again
from autogate.switching.record import Fusing
from autogate.switching.structure import Structure

__all__ = [
    "FULL",
    "SUBNETS",
    "Fusing",
    "Structure",
    "Subnets",
    "check_one_width",
    "extract",
    "form_of",
    "fuse",
    "fuse_again",
    "subnets_of",
]
