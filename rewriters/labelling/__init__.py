"""Find which channels live or die together. In: a captured graph. Out: a `ChannelMap`."""

from rewriters.labelling.channel_map import (
    ALWAYS,
    ChannelMap,
    Group,
    Kernel,
    Pin,
    Side,
    Statistic,
    distinct,
    empty_ends,
    gather,
)
from rewriters.labelling.labels import Labelled, parts, picked, reshaped, varying
from rewriters.labelling.propagate import Labelling
from rewriters.labelling.read_channel_map import keeps_classes, read_channel_map, same_classes
from rewriters.labelling.settling import (
    merge_grids,
    pin_ungated_statistics,
    pin_ungated_zeros,
    tie_recurrent_layers,
)

__all__ = [
    "ALWAYS",
    "ChannelMap",
    "Group",
    "Kernel",
    "Labelled",
    "Labelling",
    "Pin",
    "Side",
    "Statistic",
    "distinct",
    "empty_ends",
    "gather",
    "keeps_classes",
    "merge_grids",
    "parts",
    "picked",
    "pin_ungated_statistics",
    "pin_ungated_zeros",
    "read_channel_map",
    "reshaped",
    "same_classes",
    "tie_recurrent_layers",
    "varying",
]
