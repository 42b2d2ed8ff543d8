"""Sizes as a `torch.Size` that is sliced, multiplied and joined with others."""

# ruff: noqa: RUF005 (tuples that are joined are what is tested)

from __future__ import annotations

import copy
import functools
import math
import operator

import numpy as np
import pytest
import torch
from torch import nn

from rewriters.outputs import relative_error, run_eval
from tests.rewriters.exactness import TOLERANCE, assert_exact, place_statistics, random_live, slim, zero_kernels
from tests.rewriters.helpers import Net, conv, image


def by_loop(y):
    product = 1
    for size in y.size()[1:]:
        product *= size
    return product


FLATTENED = {
    "numel": lambda m, y: y.view(-1, y.size()[1:].numel()),
    "math.prod": lambda m, y: y.view(-1, math.prod(y.shape[1:])),
    "np.prod": lambda m, y: y.view(-1, int(np.prod(y.shape[1:]))),
    "reduce": lambda m, y: y.view(-1, functools.reduce(operator.mul, y.shape[1:], 1)),
    "loop": lambda m, y: y.view(-1, by_loop(y)),
    "joined": lambda m, y: y.reshape(y.size()[:1] + (8, 16)).reshape(y.size()[:1] + (-1,)),
    "joined in front": lambda m, y: y.reshape((y.size(0) * 2,) + (4,) + y.size()[2:]).reshape(y.size(0), -1),
    "heads": lambda m, y: y.movedim(1, 3).reshape(y.movedim(1, 3).size()[:-1] + (2, 4)).flatten(1),
    "zeros": lambda m, y: (y + torch.zeros(y.size()[:1] + (8, 4, 4), dtype=y.dtype)).flatten(1),
    "expanded": lambda m, y: (y + m.one.expand(y.size()[:1] + (8, 4, 4))).flatten(1),
    "unflattened": lambda m, y: y.flatten(1).unflatten(1, (8,) + y.size()[2:]).flatten(1),
}


def made(forward) -> Net:
    torch.manual_seed(0)
    members = {"a": conv(3, 8), "b": nn.Linear(128, 2), "one": torch.ones(1, 1, 1, 1)}
    return Net(lambda m, x: m.b(forward(m, m.a(x))), **members).double().eval()


@pytest.mark.parametrize("forward", FLATTENED.values(), ids=FLATTENED)
def test_channels_go_through_sizes_that_are_computed(forward):
    assert assert_exact(made(forward), (image().double(),)).analysis.channel_map.size in (2, 4, 8)


@pytest.mark.parametrize("forward", FLATTENED.values(), ids=FLATTENED)
def test_such_a_forward_runs_for_other_batches_and_copied(forward):
    slimmed = slim(made(forward), (image().double(),), share=0.6, seed=2)
    gated, channel_map = made(forward), slimmed.analysis.channel_map
    live = random_live(channel_map.size, 0.6, 2)
    assert not live.all() and slimmed.plan.kept
    zero_kernels(gated, channel_map, live)
    place_statistics(gated, slimmed.analysis, live)
    for batch in (1, 5):
        x = (image(batch=batch).double(),)
        assert relative_error(run_eval(copy.deepcopy(slimmed.model), x), run_eval(gated, x)) <= TOLERANCE
