"""What people write inside forwards that have to be rewritten: right at the example's sizes and at others."""

import copy
import functools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import nn

from rewriters.analysis.analyse import analyse
from rewriters.forwards.guards import ShapeGuardError
from rewriters.outputs import relative_error, run_eval
from tests.rewriters.exactness import TOLERANCE, slim
from tests.rewriters.helpers import conv


def values(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


OTHERS = [(3, 3, 4, 4), (1, 3, 4, 4), (2, 3, 6, 5), (2, 3, 1, 1)]


class Halves(nn.Module):
    """The second half of the channels goes through an idiom; both halves end with other numbers of channels."""

    def __init__(self, idiom):
        super().__init__()
        self.idiom, self.a, self.b, self.head = idiom, conv(3, 16), conv(8, 8), conv(8, 4)
        self.layers, self.plain = nn.Sequential(nn.ReLU(), nn.Tanh(), nn.ReLU()), [F.relu, nn.Tanh()]
        self.activation = functools.partial(F.leaky_relu, negative_slope=0.2)
        self.tied, self.matrix = nn.Parameter(torch.randn(6, 8, 1, 1)), nn.Parameter(torch.randn(6, 8))

    def forward(self, x):
        first, second = self.a(x).chunk(2, 1)
        return self.head(torch.tanh(first) * self.b(self.idiom(self, second)))


def without_gradients(y):
    with torch.no_grad():
        return y * 2


def asserted(y):
    assert y.dim() == 4, f"{y.shape}"
    return y


def by_shape(y, *shape):
    batch, channels, *rest = shape
    return y.reshape(batch, channels, -1).reshape(batch, channels, *rest)


@torch.jit.script
def scripted(y, scale: int):
    batch, channels, height, width = y.shape
    return y.reshape(batch, channels, height * width).sigmoid().reshape(batch, channels, height, width) * scale


IDIOMS = {
    "int of a size": lambda m, y: y.reshape(int(y.shape[0]), 8, -1).view(y.shape),
    "int of a root": lambda m, y: y.flatten(2).reshape(*y.shape[:2], int(math.sqrt(y.shape[2] ** 2)), -1),
    "torch.Size": lambda m, y: y.flatten(2).reshape(torch.Size([y.shape[0], 8, y.shape[2], y.shape[3]])),
    "sum of torch.Size": lambda m, y: y.flatten(2).reshape(y.shape[:2] + torch.Size([y.shape[2], y.shape[3]])),
    "np.prod": lambda m, y: y.reshape(y.shape[0], 8, np.prod(y.shape[2:])).view(y.shape),
    "math.sqrt": lambda m, y: y / math.sqrt(y.shape[1] * y.shape[2]),
    "math.ceil": lambda m, y: F.pad(y, (0, math.ceil(y.shape[3] / 4) * 4 - y.shape[3]))[..., : y.shape[3]],
    "math.floor": lambda m, y: y * math.floor(y.shape[2] / 3),
    "float of sizes": lambda m, y: y / float(y.shape[2]) / math.sqrt(float(y.shape[1] * y.shape[3])),
    "np.sqrt of a product": lambda m, y: y / np.sqrt(np.prod(y.shape[1:])) / np.sqrt(y.shape[1]),
    "np.log": lambda m, y: y / (1 + np.log(y.shape[2])) * np.float64(y.shape[2] ** 0.5 > 0),
    "np.sum of a shape": lambda m, y: y * (np.sum(y.shape[2:]) - np.float64(0.5) * y.shape[3]),
    "a scripted function": lambda m, y: scripted(y, y.shape[2]),
    "round": lambda m, y: y * round(y.shape[2] * 0.6),
    "divmod": lambda m, y: y * sum(divmod(y.shape[2], 3)),
    "sum of a shape": lambda m, y: y * sum(y.shape[2:]),
    "enumerated shape": lambda m, y: y * sum(index * size for index, size in enumerate(y.shape[2:])),
    "min of a size": lambda m, y: y.view(min(y.shape[0], 1), -1, *y.shape[1:]).flatten(0, 1),
    "min and max of sizes": lambda m, y: y * min(len(y), 2) / max(y.shape[2:]) + max(y.size(3), min(2, y.size()[2])),
    "numel": lambda m, y: y / y[0].numel(),
    "channels over samples": lambda m, y: y * len(y[0]) / len(y),
    "numel of a shape": lambda m, y: y / y.size()[1:].numel(),
    "sizes in one tuple": lambda m, y: y.reshape(y.size()[:1] + (4, 2) + y.size()[2:]).flatten(1, 2),  # noqa: RUF005
    "a saved shape": lambda m, y: (lambda shape: y.flatten().reshape(shape))(y.shape),
    "a saved list": lambda m, y: (lambda shape: y.flatten(1).reshape(shape))(list(y.shape)),
    "a shape as arguments": lambda m, y: by_shape(y, *y.shape),
    "repeated tuple": lambda m, y: F.pad(y, (1,) * 4)[..., 1:-1, 1:-1],
    "finfo": lambda m, y: y.clamp(min=torch.finfo(y.dtype).min) + torch.finfo(y.dtype).eps,
    "a layer made in the forward": lambda m, y: nn.ReLU()(y),
    "a layer with a size": lambda m, y: nn.Upsample(size=y.shape[2:])(y),
    "a slice of layers": lambda m, y: m.layers[:2](y),
    "a plain list of layers": lambda m, y: functools.reduce(lambda value, layer: layer(value), m.plain, y),
    "no_grad": lambda m, y: y + without_gradients(y),
    "set_grad_enabled": lambda m, y: torch.no_grad()(lambda: y * 3)() + y,
    "partial": lambda m, y: m.activation(y),
    "numpy's number first": lambda m, y: np.float64(2.0) * y,
    "numpy's number last": lambda m, y: y * np.float32(0.5) * np.int64(3),
    "to another tensor": lambda m, y: y.to(m.b.weight.device).to(m.b.weight),
    "type_as": lambda m, y: y.type_as(m.b.weight).cpu(),
    "hsplit": lambda m, y: torch.cat(y.hsplit(2)[::-1], 1),
    "every second channel": lambda m, y: torch.cat([y[:, ::2], y[:, 1::2]], 1),
    "an open slice": lambda m, y: torch.cat([y[..., 4:, :, :], y[..., :4, :, :]], 1),
    "__iadd__": lambda m, y: (y * 1).__iadd__(y),
    "new_tensor": lambda m, y: y * y.new_tensor([2.0]),
    "assert": lambda m, y: asserted(y),
    "getattr with a default": lambda m, y: y * getattr(m, "nothing", 2.0),
    "checkpoint": lambda m, y: torch.utils.checkpoint.checkpoint(torch.tanh, y, use_reentrant=False),
    "permute(*range)": lambda m, y: y.permute(*range(4)),
    "a transposed kernel": lambda m, y: F.conv2d(F.conv2d(y, m.tied).relu(), m.tied.transpose(0, 1)),
    "a transposed matrix": lambda m, y: (y.movedim(1, -1) @ m.matrix.t() @ m.matrix).movedim(-1, 1),
    "a sum along channels": lambda m, y: y * (y * y.tanh()).sum(1, keepdim=True),
    "a mean by a sum": lambda m, y: y - y.sum(1, keepdim=True) / y.shape[1],
    "a sum of everything": lambda m, y: y * torch.sum(y) / y[0].numel(),
    "einsum": lambda m, y: y * torch.einsum("bchw,bchw->bhw", y, y.tanh())[:, None],
    "einsum over positions too": lambda m, y: y * torch.einsum("bchw,bchw->b", y, y.tanh())[:, None, None, None],
    "bmm": lambda m, y: y * torch.bmm(y.flatten(2).mT, y.tanh().flatten(2)).mean(2).view(len(y), 1, *y.shape[2:]),
    "attention over pixels": lambda m, y: (y.flatten(2) @ (y.flatten(2).mT @ y.flatten(2)).softmax(-1)).view(y.shape),
    "pooled along tokens": lambda m, y: F.avg_pool2d(y.movedim(1, -1), (3, 1), 1, (1, 0)).movedim(-1, 1),
    "the largest of tokens": lambda m, y: F.max_pool2d(y.movedim(1, -1), (3, 1), (1, 1), (1, 0)).movedim(-1, 1),
    "cosine_similarity": lambda m, y: y * F.cosine_similarity(y, y.tanh(), 1)[:, None],
    "normalised and multiplied": lambda m, y: y * (F.normalize(y) * F.normalize(y.tanh())).sum(1, keepdim=True),
    "pairwise_distance": lambda m, y: y * F.pairwise_distance(y.movedim(1, 3), y.movedim(1, 3).tanh(), 1.0)[:, None],
    "renorm of samples": lambda m, y: y.renorm(2, 0, 1.0) + torch.renorm(y, 1, -4, 2.0),
    "renorm of channels": lambda m, y: y.renorm(2, 1, 0.5),
    "attention in one call": lambda m, y: (lambda z: F.scaled_dot_product_attention(z, z, z).mT.view(y.shape))(
        y.flatten(2).mT
    ),
    "attention with a scale": lambda m, y: (lambda z: F.scaled_dot_product_attention(z, z.tanh(), z, scale=0.3))(
        y.movedim(1, -1)
    ).movedim(-1, 1),
    "embedding_bag": lambda m, y: (lambda rows: y * F.embedding_bag(
        torch.arange(len(rows)).view(-1, y.shape[3]), rows, mode="max"
    ).view(*y.shape[::2], 8).movedim(2, 1)[..., None])(y.movedim(1, -1).flatten(0, 2)),
    "affine_grid": lambda m, y: F.grid_sample(y, F.affine_grid(
        y.mean((1, 2, 3)).view(-1, 1, 1).expand(-1, 2, 3), [len(y), 8, *y.shape[2:]], align_corners=False
    ), align_corners=False),
    "cdist": lambda m, y: y * torch.cdist(y.flatten(2).mT, y.tanh().flatten(2).mT).mean((1, 2))[:, None, None, None],
}  # fmt: skip


def slim_and_gated(model, *args):
    analysis = None
    for seed in range(1, 9):
        trial = copy.deepcopy(model)
        slimmed = slim(trial, args, share=0.6, seed=seed, analysis=analysis)
        analysis = slimmed.analysis
        if "" in slimmed.plan.forwards:
            break
    assert "" in slimmed.plan.forwards and slimmed.error <= TOLERANCE
    gated = copy.deepcopy(trial)
    slimmed.undo_log.undo()
    return gated, trial


@pytest.mark.parametrize("name", IDIOMS)
def test_idioms_at_other_sizes(name):
    torch.manual_seed(0)
    slim_model, gated = slim_and_gated(Halves(IDIOMS[name]).double().eval(), values(2, 3, 4, 4))
    for shape in OTHERS:
        x = values(*shape)
        wanted = run_eval(gated, (x,))
        assert relative_error(run_eval(slim_model, (x,)), wanted) <= TOLERANCE
        assert relative_error(run_eval(copy.deepcopy(slim_model), (x,)), wanted) <= TOLERANCE
        assert relative_error([slim_model.train()(x)], [gated.train()(x)]) <= TOLERANCE


@pytest.mark.parametrize("idiom", [
    lambda m, y: torch.stack([y[index] for index in range(len(y))]), lambda m, y: torch.stack(list(y)),
])  # fmt: skip
def test_loops_over_samples_are_as_long_as_the_example(idiom):
    slim_model, gated = slim_and_gated(Halves(idiom).double().eval(), values(2, 3, 4, 4))
    x = values(2, 3, 6, 5)
    assert relative_error(run_eval(slim_model, (x,)), run_eval(gated, (x,))) <= TOLERANCE
    with pytest.raises(ShapeGuardError, match=r"Halves: .* was 2, which now is 3"):
        slim_model(values(3, 3, 4, 4))


@pytest.mark.parametrize("idiom", [
    lambda m, y: y * 1 if y.requires_grad else y * 2, lambda m, y: y * 1 if torch.is_grad_enabled() else y * 2,
    lambda m, y: y * 1 if torch.is_autocast_enabled("cpu") else y * 2,
    lambda m, y: y * 1 if torch.is_inference_mode_enabled() else y * 2,
    lambda m, y: y.to(torch.get_autocast_dtype("cpu")).double(),
])  # fmt: skip
def test_channels_stay_where_a_forward_asks_for_what_its_caller_switched_on(idiom):
    """Gradients, autocast, inference mode: another answer later would find the traced way."""
    found = analyse(Halves(idiom).double().eval(), (values(2, 3, 4, 4),)).channel_map
    assert found.size == 0
    assert any("it asks " in pin.reason for pin in found.pins)


@pytest.mark.parametrize(
    "idiom",
    [
        lambda m, y: y * (y.shape[1] + y.shape[2]) / 7.0,
        lambda m, y: y * (math.ceil(y.shape[1] / 3) / math.ceil(y.shape[2] / 3)),
    ],
    ids=["sum", "rounded"],
)
def test_channels_stay_where_a_number_mixes_them_with_other_sizes(idiom):
    """A product has a part that channels make, which stays as it was. No such part is in these numbers."""
    found = analyse(Halves(idiom).double().eval(), (values(2, 3, 4, 4),)).channel_map
    assert any("it computes with channels and other sizes in one number" in pin.reason for pin in found.pins)


def test_gradients_are_recorded_as_before():
    slim_model, gated = slim_and_gated(Halves(IDIOMS["no_grad"]).double().eval(), values(2, 3, 4, 4))
    x = values(2, 3, 4, 4).requires_grad_()
    ours, theirs = (torch.autograd.grad(model(x).sum(), x)[0] for model in (slim_model, gated))
    assert relative_error([ours], [theirs]) <= TOLERANCE
    with torch.no_grad():
        slim_model(x)
        assert not torch.is_grad_enabled()


def with_default(forward):
    @functools.wraps(forward)
    def wrapped(self, *args, **kwargs):
        kwargs["scale"] = kwargs.get("scale") or 2.0
        return forward(self, *args, **kwargs)

    return wrapped


class Decorated(Halves):
    @with_default
    def forward(self, x, scale=None):
        return super().forward(x) * scale


def test_a_decorator_that_sets_a_keyword():
    slim_model, gated = slim_and_gated(Decorated(lambda m, y: y).double().eval(), values(2, 3, 4, 4))
    x = values(3, 3, 6, 5)
    assert relative_error(run_eval(slim_model, (x,)), run_eval(gated, (x,))) <= TOLERANCE
    with pytest.raises(ShapeGuardError, match="scale was None, which now is"):
        slim_model(x, scale=3.0)
