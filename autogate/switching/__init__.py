"""Several widths in one network. In: a model and structures. Out: the same model, which can be switched."""

from autogate.switching.bank import SUBNETS, Subnets, check_one_width
from autogate.switching.fusing import FULL, extract, fuse
from autogate.switching.structure import Structure

__all__ = ["FULL", "SUBNETS", "Structure", "Subnets", "check_one_width", "extract", "fuse"]
