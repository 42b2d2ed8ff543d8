"""Blocks that random networks are composed of, each with a forward written by hand.

A block is made from a random generator and the shape of its input, without the batch: `Block(rng, shape)`
for shape (channels, *spatial). Most work for one, two and three spatial dimensions. Sizes in the forwards
are plain numbers, as they are in the networks people write. A block that holds the spatial size of its input
has `any_size = False`.
"""

from __future__ import annotations

from tests.rewriters.blocks.convolutions import (
    Bilinear,
    ChannelsLast,
    Depthwise,
    DynamicConv,
    FunctionalConv,
    FunctionalLayers,
    Grouped,
    PixelShuffle,
    ShuffleUnit,
    StandardisedConv,
)
from tests.rewriters.blocks.gating import (
    Attention,
    EfficientChannelAttention,
    FoldedAttention,
    GatedUnit,
    PositionGate,
    PositionsAsChannels,
    SelectiveKernel,
    SpatialAttention,
    SplitAttention,
    SqueezeExcite,
)
from tests.rewriters.blocks.idioms import Popped, Returned, Sized, TrainOnly
from tests.rewriters.blocks.joins import (
    CrossStage,
    Dense,
    Ghost,
    Halving,
    Partial,
    Rearranged,
    Res2,
    SliceAdd,
    UnevenSplit,
)
from tests.rewriters.blocks.norms import InstanceScale, PreNorm, Statistics
from tests.rewriters.blocks.residual import (
    Branches,
    Dropped,
    Nested,
    PadShortcut,
    Plain,
    Preactivated,
    Pyramid,
    Resample,
    Residual,
    Transposed,
    TwoStreams,
)
from tests.rewriters.blocks.shared import Constants, Shared, SharedPair, SharedPlumbing, Unknown
from tests.rewriters.blocks.ways import ByLength, ByMask
from tests.rewriters.blocks.writing import Written

ANY = (
    SharedPlumbing, SharedPair, Halving, Plain, Plain, Preactivated, Residual, Residual, PadShortcut, Dense,
    CrossStage, UnevenSplit, Res2, Ghost, Partial,
    SliceAdd, SqueezeExcite, Depthwise, Grouped, ShuffleUnit, Transposed, Resample, Shared, Pyramid, SelectiveKernel,
    SplitAttention, FunctionalConv, FunctionalLayers, ChannelsLast, Attention, SpatialAttention, PositionGate,
    EfficientChannelAttention, GatedUnit, Rearranged, Unknown, StandardisedConv, Bilinear, Constants, Dropped,
    Branches, TwoStreams, Nested, InstanceScale, Statistics, PreNorm, PreNorm, FoldedAttention,
    PositionsAsChannels, Written, Returned, Returned, TrainOnly, TrainOnly, Popped, Sized, Sized,
)  # fmt: skip
"""Blocks for any number of spatial dimensions."""

IMAGES = (*ANY, PixelShuffle, DynamicConv)
"""Blocks for images."""

WAYS = (ByMask, ByMask, ByLength)
"""Blocks that take several ways, for any number of spatial dimensions."""
