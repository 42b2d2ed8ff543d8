"""All that is known of a model's channels."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor, nn

from rewriters.analysis.own_code import OwnCode
from rewriters.cross_channel import (
    StatisticSite,
    gather_statistics,
    install_live_statistics,
    remove_live_statistics,
    write_live,
)
from rewriters.forwards import LabelMask, TracedForward
from rewriters.labelling import ChannelMap, Labelling, read_channel_map
from rewriters.recording import Capture, Kept
from rewriters.undo_log import UndoLog


@dataclass
class Analysis:
    """All that is known of a model's channels.

    Attributes:
        recorded: for each of the example inputs the captured forward, in eval mode, and in train mode too if that is
            another forward.
        labelling: labels of every tensor in them.
        trains_otherwise: whether it is another forward in train mode, captured or not.
        traced: the traced forwards of modules that may hold a size.
        own_code: modules that hold sizes in attributes, and keep their code.
        resized: paths of the modules whose forward some patterns of dead classes change.
        sites: modules whose own forward takes statistics across channels.
        channel_map: the partition of the channels.
    """

    recorded: Sequence[Sequence[Capture]]
    labelling: Labelling
    trains_otherwise: bool = False
    traced: list[TracedForward] = field(default_factory=list)
    own_code: list[OwnCode] = field(default_factory=list)
    resized: set[str] = field(default_factory=set)
    sites: list[StatisticSite] = field(default_factory=list)
    channel_map: ChannelMap = field(init=False)

    @property
    def captures(self) -> list[Capture]:
        """All captures; the first is that of the first example inputs in eval mode."""
        return [captured for one in self.recorded for captured in one]

    @property
    def in_eval_mode(self) -> list[Capture]:
        """The captures in eval mode, one for each of the example inputs."""
        return [one[0] for one in self.recorded]

    @property
    def kept(self) -> tuple[Kept, ...]:
        """Attributes in which forwards keep tensors for later calls, and that have none yet."""
        return tuple(dict.fromkeys(one for captured in self.captures for one in captured.kept))

    @property
    def opaque(self) -> frozenset[str]:
        """Paths of the opaque modules."""
        return frozenset(path for captured in self.captures for path in captured.opaque)

    def label_mask(self, live: Tensor) -> LabelMask:
        """Which labels stay if the classes in `live` (bool, shape (classes,)) do."""
        return LabelMask(self.labelling.stays(live))

    def settle(self, samples: int) -> None:
        """Read the channel map off the labels, for a forward that was captured on this number of samples."""
        channel_map = read_channel_map(self.labelling, samples)
        taken = gather_statistics(self.sites, self.labelling.class_of_label()) if self.sites else ()
        self.channel_map = replace(channel_map, statistics=taken)

    def place_statistics(self, model: nn.Module, undo_log: UndoLog) -> None:
        """Take statistics across channels over the live ones, which are all of them until `write_live`."""
        install_live_statistics(model, self.sites, self.labelling.class_of_label(), undo_log)

    @contextlib.contextmanager
    def live_statistics(self, model: nn.Module, live: Tensor) -> Iterator[None]:
        """Inside, statistics are taken over the classes in `live` (bool, shape (classes,))."""
        undo_log = UndoLog()
        remove_live_statistics(model, undo_log)
        self.place_statistics(model, undo_log)
        write_live(model, self.channel_map, live)
        try:
            yield
        finally:
            undo_log.undo()
