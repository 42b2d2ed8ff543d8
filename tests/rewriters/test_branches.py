"""Branches that came to nothing are taken out, whatever the forward they are in is called with."""

from torch import nn

from tests.rewriters.exactness import assert_exact
from tests.rewriters.helpers import conv, image


class WithOptions(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.inner, self.outer, self.head = conv(3, 4), conv(4, 5), conv(5, 4), conv(4, 2)

    def forward(self, x, *others, **options):
        y = self.stem(x) * options["scale"] + others[0]
        return self.head(y + self.outer(self.inner(y)))


def test_a_forward_that_takes_any_keywords():
    x = image().double()
    slimmed = assert_exact(WithOptions().double(), (x, 0.5), {"scale": 2.0, "unused": None})
    assert slimmed.plan.removed == {"inner", "outer"}
