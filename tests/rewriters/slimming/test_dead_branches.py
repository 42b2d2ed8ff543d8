"""Dead branches are removed, whatever arguments their forward takes."""

import torch
from torch import nn

from rewriters.labelling.channel_map import Side
from rewriters.outputs import relative_error, run_eval
from rewriters.slimming.plan import apply
from rewriters.undo_log import UndoLog
from tests.rewriters.exactness import assert_exact
from tests.rewriters.helpers import conv, image


class WithOptions(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.inner, self.outer, self.head = conv(3, 4), conv(4, 5), conv(5, 4), conv(4, 2)

    def forward(self, x, *others, **options):
        y = self.stem(x) * options["scale"] + others[0]
        return self.head(y + self.outer(self.inner(y)))


def test_a_forward_that_takes_any_number_of_arguments():
    class Summing(WithOptions):
        def forward(self, x, *others):
            return super().forward(x, *others, scale=2.0)

    x = image().double()
    slimmed = assert_exact(Summing().double(), (x, 0.5))
    assert slimmed.plan.removed == {"inner", "outer"}


def test_a_branch_stays_where_any_keyword_may_be_given():
    x = image().double()
    slimmed = assert_exact(WithOptions().double(), (x, 0.5), {"scale": 2.0, "unused": None})
    apply(slimmed.model, slimmed.plan, UndoLog())
    assert slimmed.model.inner.out_channels == 1 and not slimmed.plan.removed
    wanted = run_eval(slimmed.model, (x, 0.5), {"scale": 2.0, "unused": None})
    got = run_eval(slimmed.model, (x, 0.5), {"scale": 2.0, "more": 1, "others": 2})
    assert relative_error(got, wanted) == 0


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.outer, self.second, self.third = conv(4, 5), conv(5, 4), conv(4, 5), conv(5, 4)

    def forward(self, x):
        return x + self.outer(self.inner(x)) + self.third(self.second(x))


class Asking(nn.Module):
    """Reads a field of what one of its blocks calls, as nn.TransformerEncoder does."""

    def __init__(self):
        super().__init__()
        self.stem, self.blocks, self.head = conv(3, 4), nn.ModuleList([Block(), Block()]), conv(4, 2)

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x) * float(self.blocks[0].inner.stride[0])
        return self.head(x)


def test_a_branch_that_other_code_asks_something_of_stays_one_channel_wide():
    slimmed = assert_exact(Asking().double(), (image().double(),))
    assert slimmed.plan.removed == {f"blocks.1.{name}" for name in ("inner", "outer", "second", "third")}
    assert len(slimmed.plan.kept[Side("blocks.0.inner.weight", 0)]) == 1


def test_a_transformer_encoder_whose_first_layer_loses_all_heads():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True)
    model = nn.Sequential(nn.Linear(3, 8), nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(8, 2))
    slimmed = assert_exact(model.double(), (torch.randn(2, 5, 3).double(),))
    assert "1.layers.1.self_attn" in slimmed.plan.removed and "1.layers.0.self_attn" not in slimmed.plan.removed
