"""Models that draw random numbers in eval mode: what is drawn is compared too, and generators are left as they were."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import autogate
from autogate.slim import finalizing
from tests.rewriters.helpers import Net, conv, image


def noise_of_what_shrinks(m, x):
    mean, deviation = m.a(x).chunk(2, 1)
    return m.b(mean + torch.randn_like(mean) * (deviation / 2).exp())


def noise_for_each_position(m, x):
    """As in StyleGAN: one image of noise for all channels, each with a strength of its own."""
    y = m.a(x)
    return m.b(F.leaky_relu(y + torch.randn(len(y), 1, *y.shape[2:]) * m.strength)[:, :4])


class Noise(nn.Module):
    """Draws from a generator of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(3)

    def forward(self, y: Tensor) -> Tensor:
        return y + torch.randn(y.shape[2:], generator=self.generator)


def noise_of_one_generator(m, x):
    y = m.a(x)
    return m.b(m.noise(y * torch.rand_like(y))[:, :4])


def picked_at_random(m, x):
    """As a masked autoencoder: some of the positions, in random order."""
    tokens = m.a(x)[:, :4].flatten(2).transpose(1, 2)
    order = torch.rand(tokens.shape[:2]).argsort(1)[:, :6, None].expand(-1, -1, tokens.shape[2])
    return tokens.gather(1, order) @ m.b.weight.flatten(1).T


def dropped_always(m, x):
    return m.b(F.dropout(m.a(x)[:, :4], 0.5, training=True) + torch.rand(()))


def several_draws(m, x):
    y = m.a(x)[:, :4]
    y = y * torch.randn_like(y) + torch.rand_like(y[:1])
    return m.b(y + torch.rand(len(y), 1, 4, 4)) + torch.randn(()) + torch.randint_like(x[:, :1], 3)


FORWARDS = [
    noise_of_what_shrinks, noise_for_each_position, noise_of_one_generator, picked_at_random, dropped_always,
    several_draws,
]  # fmt: skip


def prepared(forward, dead=slice(0, None, 2)) -> nn.Module:
    torch.manual_seed(0)
    model = Net(forward, a=conv(3, 8), b=conv(4, 2), strength=nn.Parameter(torch.rand(8, 1, 1)), noise=Noise()).eval()
    model = autogate.prepare(model, image(), flops=1.0)
    with torch.no_grad():
        autogate.gates(model).alpha[dead] = 0
    return model


def drawn_twice(model: nn.Module, x: Tensor) -> list[Tensor]:
    found = []
    for _ in range(2):
        torch.manual_seed(1)
        model.noise.generator.manual_seed(1)
        found.append(model(x))
    return found


@pytest.mark.parametrize("forward", FORWARDS)
def test_models_that_draw_are_slimmed_and_generators_are_as_before(forward):
    model = prepared(forward)
    before = torch.get_rng_state(), model.noise.generator.get_state()
    slim = autogate.finalize(model, warn=False)
    after = torch.get_rng_state(), model.noise.generator.get_state()
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert slim.a.out_channels < 8
    first, second = drawn_twice(slim, image(3))
    assert torch.equal(first, second) and not torch.equal(slim(image(3)), slim(image(3)))


def test_draws_whose_shape_stays_are_the_same_in_the_slim_model():
    model = prepared(picked_at_random)
    gated, slim = copy.deepcopy(model), autogate.finalize(model, warn=False)
    assert torch.allclose(drawn_twice(gated, image(3))[0], drawn_twice(slim, image(3))[0], atol=1e-6)


@pytest.mark.parametrize("forward", FORWARDS)
def test_a_model_that_draws_and_is_slimmed_wrongly_is_refused(forward, monkeypatch):
    def carry_out_wrongly(model, *args, **kwargs):
        done = slim_and_record(model, *args, **kwargs)
        with torch.no_grad():
            model.b.weight.mul_(1.001)
        return done

    model, slim_and_record = prepared(forward), finalizing.slim_and_record
    monkeypatch.setattr(finalizing, "slim_and_record", carry_out_wrongly)
    with pytest.raises(autogate.VerificationError):
        autogate.finalize(model, warn=False)


def test_shortcuts_of_a_model_that_draws():
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = conv(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.conv(x).relu() * torch.rand(len(x), 1, 1, 1)

    blocks = nn.Sequential(conv(3, 4), Block(), Block(), conv(4, 2))
    autogate.finalize(autogate.prepare(blocks, image(), flops=1.0, shortcuts="conv"), warn=False)


DRAWS = {
    "by size": lambda branch: torch.randn(len(branch), 4, 1, 1),
    "like a constant": lambda branch: torch.randn_like(branch.mean((2, 3), keepdim=True)),
}


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS.keys())
def test_what_is_drawn_in_a_dead_branch_is_no_constant(draw):
    """With one sample the noise is the same at all positions, as a constant for each channel would be."""

    def forward(m, x):
        branch = m.second(m.first(x).relu())
        return m.b(m.a(x) + (branch + draw(branch)))

    torch.manual_seed(0)
    model = Net(forward, a=conv(3, 4), b=conv(4, 2), first=conv(3, 4), second=conv(4, 4)).eval()
    x = image()[:1]
    model = autogate.prepare(model, x, flops=1.0)
    bank = autogate.gates(model)
    dead = {
        int(c)
        for side, classes in bank.channel_map.classes.items()
        if side.tensor == "first.weight" and side.dim == 0
        for c in classes
    }
    with torch.no_grad():
        bank.alpha[list(dead)] = 0
    slim = autogate.finalize(model, warn=False)
    assert not torch.equal(slim(x), slim(x))
