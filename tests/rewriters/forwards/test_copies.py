"""Copies of a module keep its rewritten forward, in whatever way its class copies and pickles it."""

import copy
import pickle

import pytest
import torch
from torch import nn

from rewriters.cross_channel.installing import remove_live_statistics
from rewriters.outputs import run_eval
from rewriters.undo_log import UndoLog
from tests.rewriters.exactness import copies_agree, slim
from tests.rewriters.helpers import conv, image


class Halves(nn.Module):
    """Splits in the middle, and normalises by itself."""

    def __init__(self, scale=2.0):
        super().__init__()
        self.scale = scale

    def forward(self, x):
        first, second = x.chunk(2, 1)
        return torch.cat([second * self.scale, first / (1 + first.var(1, keepdim=True))], 1)


class Stateful(Halves):
    def __getstate__(self):
        return {"scale": self.scale}

    def __setstate__(self, state):
        self.__init__(**state)


class Reduced(Halves):
    def __reduce__(self):
        return Reduced, (self.scale,)


class Copied(Halves):
    def __deepcopy__(self, memo):
        return Copied(self.scale)

    def __reduce_ex__(self, protocol):
        return Copied, (self.scale,)


class Whole(Halves):
    """Leaves out a cache only, as most classes do that say what to pickle."""

    def __getstate__(self):
        return {name: value for name, value in self.__dict__.items() if name != "cache"}


KINDS = [Halves, Stateful, Reduced, Copied, Whole]


def network(kind):
    torch.manual_seed(0)
    return nn.Sequential(conv(3, 16), kind(), conv(16, 8), kind(), conv(8, 2)).double().eval()


@pytest.mark.parametrize("kind", KINDS)
def test_copies_of_a_slim_model(kind):
    args = (image().double(),)
    slimmed = slim(network(kind), args, share=0.6, seed=1)
    assert slimmed.plan.forwards
    assert copies_agree(slimmed, args, {})
    twice = pickle.loads(pickle.dumps(copy.deepcopy(copy.deepcopy(slimmed.model))))
    assert torch.equal(run_eval(twice, args)[0], slimmed.got[0])
    assert twice[1].forward.owner is twice[1]


@pytest.mark.parametrize("kind", KINDS)
def test_copies_of_a_model_whose_statistics_are_live(kind):
    args = (image().double(),)
    model = network(kind)
    slimmed = slim(model, args, share=0.6, seed=1)
    slimmed.undo_log.undo()
    assert slimmed.analysis.sites
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(run_eval(other, args)[0], slimmed.wanted[0])
        remove_live_statistics(other, UndoLog())
        assert type(other[1]) is kind and "forward" not in vars(other[1]) and not other[1]._modules
    slimmed.placed.undo()
    assert not {"forward", "__reduce_ex__", "__deepcopy__"} & vars(model[1]).keys()
