"""The gates of a model: stored in its kernels, moved after each optimizer step."""

from autogate.gating import hooks
from autogate.gating.bank import BANK, GateBank
from autogate.gating.hooks import optimizers_of
from autogate.gating.preparable import check_preparable, gated_within, way_out
from autogate.gating.progress import Progress
from autogate.gating.sharding import has_shards

__all__ = [
    "BANK",
    "GateBank",
    "Progress",
    "check_preparable",
    "gated_within",
    "has_shards",
    "hooks",
    "optimizers_of",
    "way_out",
]
