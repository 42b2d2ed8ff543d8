"""What forwards keep of earlier calls doesn't hide what it was computed from, and doesn't outlive it."""

import torch
from torch import nn

from rewriters.analysis import analyse
from rewriters.channel_map import Side
from rewriters.verify import run_eval
from tests.rewriters.exactness import assert_exact
from tests.rewriters.helpers import conv, image


class Looked(nn.Module):
    """Adds a bias that is looked up in a table, in eval mode only once."""

    def __init__(self):
        super().__init__()
        self.a, self.b = conv(3, 4), conv(4, 2)
        self.table, self.cache = nn.Parameter(torch.randn(3, 4)), {}

    def bias(self):
        if self.training:
            return self.table[torch.tensor([1])].view(1, -1, 1, 1)
        if "bias" not in self.cache:
            self.cache["bias"] = self.table[torch.tensor([1])].view(1, -1, 1, 1)
        return self.cache["bias"]

    def forward(self, x):
        return self.b(self.a(x) + self.bias())


def test_a_cache_hides_nothing_from_the_analysis_and_stays_on_its_module():
    model, x = Looked().eval(), image()
    run_eval(model, (x,))
    cache, kept = model.cache, model.cache["bias"]
    assert Side("table", 1) in analyse(model, (x,)).channel_map.classes
    assert model.cache is cache
    assert model.cache["bias"] is kept


def test_a_slim_model_has_no_cache_of_the_sizes_that_were():
    model, x = Looked().double().eval(), image().double()
    run_eval(model, (x,))
    slimmed = assert_exact(model, (x,))
    assert slimmed.got[0].shape == (2, 2, 4, 4)
