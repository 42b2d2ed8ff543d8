"""Several widths in one network. In: a model and structures. Out: the same model, which can be switched."""

from autogate.switching.bank import SUBNETS, Subnets, check_one_width, subnets_of
from autogate.switching.choosing import Which, number_of
from autogate.switching.fusing import FULL, extract, fuse
from autogate.switching.latency import latencies
from autogate.switching.record import Fusing, Sharing
from autogate.switching.status import Row, Status, status_of, table_of
from autogate.switching.structure import Structure
from autogate.switching.widths import fuse_again

__all__ = [
    "FULL",
    "SUBNETS",
    "Fusing",
    "Row",
    "Sharing",
    "Status",
    "Structure",
    "Subnets",
    "Which",
    "check_one_width",
    "extract",
    "fuse",
    "fuse_again",
    "latencies",
    "number_of",
    "status_of",
    "subnets_of",
    "table_of",
]
