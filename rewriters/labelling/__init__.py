"""Find which channels live or die together: in comes a recorded graph, out comes a `ChannelMap`."""

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
    "parts",
    "picked",
    "reshaped",
    "varying",
]
