"""Which layers read the channels of one other layer alone."""

import torch
from torch import Tensor

from autogate.saliency import CountedLayer
from autogate.skipping.links import links

ZERO = torch.ones(9, dtype=torch.bool)


def layer(inputs: list[int], outputs: list[int], kind: str = "chosen") -> CountedLayer:
    return CountedLayer("", kind, 9.0, 1, torch.tensor(inputs), torch.tensor(outputs))


def sources(*layers: CountedLayer, zero: Tensor = ZERO) -> list[tuple[int | None, bool]]:
    found = links(layers, zero)
    assert [link.number for link in found] == list(range(len(layers)))
    return [(link.source, link.direct) for link in found]


def test_a_layer_within_a_block_is_the_source_of_the_next():
    stem, first, second = layer([-1, -1], [0, 1]), layer([0, 1], [2, 3]), layer([2, 3], [0, 1])
    assert sources(stem, first, second) == [(None, False), (None, True), (1, False)]


def test_all_readers_read_the_whole_source():
    source = layer([-1], [0, 1])
    assert sources(source, layer([0, 1], [2]), layer([0, 1], [3])) == [(None, True), (0, False), (0, False)]
    assert sources(source, layer([0, 1], [2]), layer([0, 1, 4], [3])) == [(None, False)] * 3
    assert sources(source, layer([0, 1], [2]), layer([0, 1, 4], [3], "whole"))[1] == (0, False)


def test_channels_that_are_not_zero_or_several_times_there_have_no_source():
    reader = layer([0, 1], [2])
    assert sources(layer([-1], [0, 1], "whole"), reader)[1] == (None, False)
    assert sources(layer([-1], [0, -1]), layer([0, -1], [2]))[1] == (None, False)
    assert sources(layer([-1], [0, 0]), layer([0, 0], [2]))[1] == (None, False)
    zero = ZERO.clone()
    zero[1] = False
    assert sources(layer([-1], [0, 1]), reader, zero=zero)[1] == (None, False)


def test_a_layer_that_adds_to_its_channels_ends_it():
    follows = layer([0, 1], [0, 1], "follows")
    assert sources(layer([-1], [0, 1]), follows, layer([0, 1], [2])) == [(None, False)] * 3
