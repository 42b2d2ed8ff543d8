"""Dead branches are removed, whatever arguments their forward takes."""

import pytest
import torch
from torch import nn

from rewriters.errors import SurgeryError
from rewriters.labelling.channel_map import Side
from rewriters.outputs import relative_error, run_eval
from rewriters.slimming.plan import apply
from rewriters.undo_log import UndoLog
from tests.rewriters.exactness import TOLERANCE, assert_exact, copies_agree, slim
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


class Up(nn.Module):
    """Blocks in a container, which is made by `kind`; each concatenates what it is given with its output."""

    def __init__(self, kind):
        super().__init__()
        self.layers = kind([conv(8, 4), conv(8, 4)])

    def forward(self, x, skips):
        layers = self.layers.values() if isinstance(self.layers, nn.ModuleDict) else self.layers
        for layer in layers:
            x, skips = layer(torch.cat([x, skips[-1]], 1)) + x, skips[:-1]
        return x


class Outer(nn.Module):
    """Asks another module's container something."""

    def __init__(self, ask, kind):
        super().__init__()
        self.first, self.middle, self.up, self.head = conv(3, 4), conv(3, 4), Up(kind), conv(4, 2)
        self.ask = ask

    def forward(self, x):
        skips = [self.first(x).relu(), self.first(x).relu(), self.first(x).tanh()]
        return self.head(self.up(self.middle(x).relu(), skips[-self.ask(self.up.layers) :]))


KINDS = {
    "list": nn.ModuleList,
    "sequential": lambda layers: nn.Sequential(*layers),
    "dict": lambda layers: nn.ModuleDict({str(index): layer for index, layer in enumerate(layers)}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_container_keeps_its_length(kind):
    slimmed = slim(Outer(len, KINDS[kind]).double(), (image().double(),), share=0.0)
    assert slimmed.error < TOLERANCE and copies_agree(slimmed, (image().double(),), {})
    assert slimmed.plan.removed == {"up.layers.0", "up.layers.1"}
    layers = slimmed.model.up.layers
    assert len(layers) == 2
    with pytest.raises(SurgeryError, match=r"up\.layers\.1: this module was removed"):
        layers["1" if kind == "dict" else -1](image().double())


ASKED = {
    "by index": lambda layers: layers[-1].kernel_size[0] + 1,
    "by slice": lambda layers: sum(layer.kernel_size[0] for layer in layers[-2:]),
    "one by one": lambda layers: sum(layer.stride[0] for layer in layers),
    "beside others": lambda layers: sum(layer.stride[0] for layer, _ in zip(layers, "abc", strict=False)),
}


@pytest.mark.parametrize("ask", ASKED)
def test_a_module_that_other_code_reads_out_of_a_container_stays(ask):
    slimmed = assert_exact(Outer(ASKED[ask], nn.ModuleList).double(), (image().double(),))
    assert "up.layers.1" not in slimmed.plan.removed


def test_a_module_that_other_code_reads_in_train_mode_stays():
    class Reading(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.block, self.head = conv(3, 4), Block(), conv(4, 2)

        def forward(self, x):
            y = self.block(self.stem(x))
            return self.head(y * self.block.inner.stride[0] if self.training else y)

    slimmed = slim(Reading().double(), (image().double(),), share=0.0)
    assert slimmed.error < TOLERANCE
    assert "block.inner" not in slimmed.plan.removed
    slimmed.model.train()(image().double())
