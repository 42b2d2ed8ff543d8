"""Layers that the example inputs don't run: what they may read stays, and the summary names them."""

import copy

import pytest
import torch
from torch import nn

import rewriters
from tests.rewriters.helpers import Net, conv, image, is_pinned


class Scales(nn.Module):
    """Has a layer for each scale, and one that its code never names."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(conv(3, 8), nn.ReLU(), conv(8, 6))
        self.up = nn.ModuleDict({"2": conv(6, 3), "4": nn.Sequential(conv(6, 8), conv(8, 3))})
        self.forgotten = conv(8, 2)

    def forward(self, x, scale=2):
        return self.up[str(scale)](self.body(x))


def test_what_a_layer_may_read_stays_and_it_runs_when_slim():
    torch.manual_seed(0)
    model = Scales().double().eval()
    analysis = rewriters.analyse(model, (image().double(),))
    found = analysis.channel_map
    (pin,) = [pin for pin in found.pins if pin.op == "not run"]
    assert pin.module == "up.4" and "body.2.weight" in {side.tensor for side in pin.sides}
    assert found.size == 8 and is_pinned(found, "body.2.weight", 0) and not is_pinned(found, "body.0.weight", 0)
    live = torch.arange(8) % 2 == 0
    with torch.no_grad():
        model.body[2].weight[:, ~live] = 0
    gated = copy.deepcopy(model)
    rewriters.apply(model, rewriters.plan(model, analysis, live, (image().double(),)), rewriters.UndoLog())
    assert model.body[0].out_channels == 4
    for scale in (2, 4):
        torch.testing.assert_close(model(image().double(), scale), gated(image().double(), scale))


def test_examples_that_run_it_free_it():
    x = image()
    found = rewriters.analyse(Scales().eval(), (x, 2), others=[((x, 4), {})]).channel_map
    assert not [pin for pin in found.pins if pin.op == "not run"] and found.size > 8


class Auxiliary(nn.Module):
    """Has a head for training alone."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.head = conv(3, 8), conv(8, 6), conv(6, 2), conv(8, 2)

    def forward(self, x):
        x = self.a(x).relu()
        return (self.c(self.b(x)), self.head(x)) if self.training else self.c(self.b(x))


@pytest.mark.parametrize(
    ("model", "size"),
    [
        (Auxiliary(), 14),
        (Net(lambda m, x: m.b(m.a(x)), a=conv(3, 8), b=conv(8, 2), unread=conv(8, 4)), 8),
        (
            Net(
                lambda m, x, y=None: m.b(m.a(x)) if y is None else m.other(m.a(x)),
                a=conv(3, 8),
                b=conv(8, 2),
                other=conv(8, 2),
            ),
            0,
        ),
    ],
)
def test_only_layers_that_code_names_and_that_run_in_no_mode_ask_for_anything(model, size):
    assert rewriters.analyse(model.eval(), (image(),)).channel_map.size == size
