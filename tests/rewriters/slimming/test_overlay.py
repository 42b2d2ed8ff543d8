"""An overlay makes a model what slimming makes of it, and the dense model stays there."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from rewriters.analysis.analyse import analyse
from rewriters.outputs import relative_error, run_eval
from rewriters.slimming.module_fields import refresh_flat_weights
from rewriters.slimming.overlay import Overlay, Place, TensorSlice, with_all_forwards
from rewriters.slimming.plan import plan
from rewriters.undo_log import UndoLog
from tests.rewriters.draws import DRAWS, chunks, over_seeds
from tests.rewriters.exactness import TOLERANCE, random_live, slim, zero_kernels
from tests.rewriters.random_networks import Recipe, build


def put(model: nn.Module, overlay: Overlay) -> None:
    overlay.put_fields()
    for one in overlay.slices:
        for place in one.places:
            place.put(one.take())
    for _, place, value in overlay.constants:
        place.put(value)
    refresh_flat_weights(model, UndoLog())


def check(recipe: Recipe, share: float, seed: int) -> None:
    network = build(recipe)
    model, args, kwargs = network.model, network.args, network.kwargs
    dense = run_eval(model, args, kwargs)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    analysis = analyse(model, args, kwargs)
    live = random_live(analysis.channel_map.size, share, seed)
    zero_kernels(model, analysis.channel_map, live)
    slim_plan = plan(model, analysis, live, args, kwargs)
    model.load_state_dict(state)  # the overlay doesn't need the zeros
    overlay = Overlay.of(model, slim_plan)
    attributes = {path: set(vars(module)) for path, module in model.named_modules()}
    put(model, overlay)
    got = run_eval(model, args, kwargs)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    overlay.remove()
    refresh_flat_weights(model, UndoLog())
    assert attributes == {path: set(vars(module)) for path, module in model.named_modules()}
    assert all(map(torch.equal, run_eval(model, args, kwargs), dense))
    wanted = slim(build(recipe).model, args, kwargs, share=share, seed=seed).got
    assert relative_error(got, wanted) <= TOLERANCE


@pytest.mark.parametrize("seeds", chunks(max(6, DRAWS // 10)), ids=str)
def test_random_networks_compute_under_an_overlay_what_slim_ones_do(seeds: range):
    over_seeds(check, seeds)


@pytest.mark.parametrize("channels_last", [False, True])
def test_a_slice_and_its_transpose(channels_last):
    layer = nn.Conv2d(6, 8, 3).double()
    layer = layer.to(memory_format=torch.channels_last) if channels_last else layer
    rows, columns = torch.tensor([0, 2, 3]), torch.tensor([1, 5])
    is_open = torch.tensor([False, True])
    one = TensorSlice("weight", (Place(layer, "weight"),), ((0, rows), (1, columns)), ((1, is_open),))
    wanted = layer.weight.detach()[rows][:, columns] * is_open.view(1, -1, 1, 1)
    assert torch.equal(one.take(), wanted)
    assert one.take().is_contiguous(memory_format=torch.channels_last) == channels_last
    gradient = torch.randn_like(wanted)
    one.take().backward(gradient)
    dot = (layer.weight.grad * layer.weight).sum()  # <spread(g), w> == <g, cut(w)>
    torch.testing.assert_close(dot, (gradient * wanted).sum())
    assert torch.equal(layer.weight.grad, one.spread(gradient, layer.weight.shape))
    torch.autograd.gradcheck(lambda weight: one.cut(weight), (layer.weight.detach().clone().requires_grad_(),))


def test_forwards_that_others_rewrite_stand_in_every_overlay():
    class Halves(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.out = nn.Conv2d(3, 8, 1), nn.Conv2d(4, 2, 1)

        def forward(self, x):
            x = self.conv(x)
            return self.out(x[:, :4] * x[:, 4:])

    model, example = Halves(), torch.randn(2, 3, 4, 4)
    analysis = analyse(model, (example,))
    live = torch.arange(analysis.channel_map.size) > 0
    slim_plan = plan(model, analysis, live, (example,))
    overlays = with_all_forwards([Overlay.of(model, slim_plan), Overlay((), (), ())])
    wanted = model(example)
    for overlay in overlays:
        overlay.put_fields()
        assert "forward" in vars(model)
        copied = copy.deepcopy(model)
        assert "forward" in vars(copied) and vars(copied)["forward"] is not vars(model)["forward"]
        overlay.remove()
        assert "forward" not in vars(model)
    assert torch.equal(model(example), wanted)


class AllOrNone(nn.Module):
    """Its channels can only go together, so the one class that is kept for the sake of a layer is all of them."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1)

    def forward(self, x):
        x = self.first(x)
        return self.second(x + x.roll(1, 1))


def test_a_layer_that_loses_all_that_it_reads_and_no_index():
    model, x = AllOrNone().double(), torch.randn(2, 3, 4, 4, dtype=torch.float64)
    analysis = analyse(model, (x,))
    assert analysis.channel_map.size == 1
    dead = torch.tensor([False])
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    zero_kernels(model, analysis.channel_map, dead)
    wanted, slim_plan = model(x), plan(model, analysis, dead, (x,))
    model.load_state_dict(state)
    assert not torch.equal(model(x), wanted)
    overlay = Overlay.of(model, slim_plan)
    assert [one.cuts for one in overlay.slices] == [()]
    put(model, overlay)
    assert torch.equal(model(x), wanted)
