"""Statistics over live channels are those of the network without the dead ones."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from rewriters.cross_channel.live_statistics import FORMS, ZEROS_ADD_NOTHING, LiveOperand, LiveStatistic
from tests.rewriters.exactness import assert_exact
from tests.rewriters.helpers import Net, conv, image

LIVE = torch.tensor([True, False, True, True, False, False, True, True])


def vector(seed: int) -> torch.Tensor:
    return torch.randn(8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 1


def forms():
    """(target, dim, arguments for full and for live channels): x is (2, 5, 8), or (2, 8, 5) where dim is 1."""
    w, b = vector(1), vector(2)
    slim_w, slim_b = w[LIVE], b[LIVE]
    yield F.layer_norm, -1, ((8,), w, b, 1e-2), ((5,), slim_w, slim_b, 1e-2)
    yield F.layer_norm, -1, ((8,), None, b), ((5,), None, slim_b)
    yield F.layer_norm, -1, ((8,),), ((5,),)
    yield F.layer_norm, -2, ((8, 5),), ((5, 5),)
    yield F.rms_norm, -1, ((8,), w, 1e-2), ((5,), slim_w, 1e-2)
    yield F.rms_norm, -1, ((8,),), ((5,),)
    yield torch.mean, -1, (-1,), (-1,)
    yield torch.mean, -2, ((0, 1), True), ((0, 1), True)
    yield torch.mean, -1, (), ()
    yield torch.var, -1, (-1,), (-1,)
    yield torch.var, -2, ((1, 2), False, True), ((1, 2), False, True)
    yield torch.var, -1, (False,), (False,)
    yield torch.std, -1, (2, True, True), (2, True, True)


CASES = [(FORMS[target], target, *rest) for target, *rest in forms()]


def images(dim: int) -> torch.Tensor:
    shape = (2, 5, 8) if dim == -1 else (2, 8, 5)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2 + 3


def living(y: torch.Tensor, dim: int) -> torch.Tensor:
    """What the live channels hold, where a result has channels."""
    return y.index_select(dim, LIVE.nonzero().flatten()) if y.ndim == 3 and y.shape[dim] == 8 else y


def written(form, dim: int, x: torch.Tensor) -> LiveStatistic:
    module = form(8, dim, x)
    module.write(LIVE)
    return module


@pytest.mark.parametrize(("form", "target", "dim", "full", "left"), CASES)
def test_live_places_hold_what_the_plain_call_without_the_dead_gives(form, target, dim, full, left):
    x = images(dim).requires_grad_()
    module = written(form, dim, x)
    got, wanted = living(module(x, *full), dim), target(living(x, dim), *left)
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)
    weights = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    gradients = [torch.autograd.grad((y * weights).sum(), x)[0] for y in (got, wanted)]
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("form", "target", "dim", "full", "left"), CASES)
def test_compiled_code_reads_the_live_channels_off_the_tensor(form, target, dim, full, left):
    x = images(dim)
    module = form(8, dim, x)
    compiled = torch.compile(module, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, *full), target(x, *full), rtol=1e-12, atol=1e-12)
    module.write(LIVE)
    with torch.compiler.set_stance("fail_on_recompile"):
        got = living(compiled(x, *full), dim)
    torch.testing.assert_close(got, target(living(x, dim), *left), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("form", "target", "dim", "full", "left"), CASES)
def test_while_all_channels_live_it_is_the_plain_call(form, target, dim, full, left):
    x = images(dim)
    assert torch.equal(form(8, dim, x)(x, *full), target(x, *full))


@pytest.mark.parametrize(("form", "target", "dim", "full", "left"), CASES)
def test_no_live_channel_gives_numbers_all_the_same(form, target, dim, full, left):
    x = images(dim)
    module = form(8, dim, x)
    module.write(torch.zeros(8, dtype=torch.bool))
    if target not in (torch.var, torch.std):  # of one element there is no variance either
        assert torch.isfinite(module(x, *full)).all()


def self_similarity(function):
    return lambda x: function(x, x.tanh())


SUMS = {
    torch.sum: (-1, lambda x: torch.sum(x, -1)),
    F.normalize: (-1, lambda x: living(F.normalize(x, 2.0, -1), -1)),
    torch.linalg.vector_norm: (-1, lambda x: torch.linalg.vector_norm(x, 3, -1)),
    torch.norm: (-2, lambda x: torch.norm(x, 2, 1, True)),
    torch.einsum: (-2, self_similarity(lambda x, y: torch.einsum("nct,ncs->ts", x, y))),
    torch.matmul: (-1, self_similarity(lambda x, y: x @ y.transpose(1, 2))),
    F.cosine_similarity: (-2, self_similarity(lambda x, y: F.cosine_similarity(x, y, 1))),
    torch.cdist: (-1, self_similarity(torch.cdist)),
}


@pytest.mark.parametrize("target", SUMS)
def test_zeros_for_dead_channels_add_nothing(target):
    assert target in ZEROS_ADD_NOTHING
    dim, call = SUMS[target]
    x = images(dim)
    operand = LiveOperand(8, dim, x)
    assert operand(x) is x
    operand.write(LIVE)
    torch.testing.assert_close(call(operand(x)), call(living(x, dim)), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("groups", [1, 2])
def test_group_norm_over_the_live_places_of_every_group(groups):
    x, w, b = torch.randn(2, 8, 3, 3, dtype=torch.float64) + 1, vector(1), vector(2)
    places = LIVE if groups == 1 else torch.tensor([True, False, True, False])
    channels = places.repeat(groups)
    module = FORMS[F.group_norm](len(places), -3, x)
    module.write(places)
    wanted = F.group_norm(x[:, channels], groups, w[channels], b[channels])
    torch.testing.assert_close(module(x, groups, w, b)[:, channels], wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("function", [torch.var_mean, torch.std_mean])
def test_spread_with_its_mean(function):
    x = images(-1)
    got = written(FORMS[function], -1, x)(x, -1, keepdim=True)
    for one, other in zip(got, function(living(x, -1), -1, keepdim=True), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_half_precision_is_as_exact_as_the_fused_norm():
    x = (torch.randn(4, 7, 8) * 3 + 20).bfloat16()
    w, b = vector(1).bfloat16(), vector(2).bfloat16()
    got = living(written(FORMS[F.layer_norm], -1, x)(x, (8,), w, b), -1)
    wanted = F.layer_norm(living(x, -1), (5,), w[LIVE], b[LIVE])
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got, wanted, rtol=2**-7, atol=2**-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_is_as_exact_as_for_the_fused_norm(dtype):
    x, w, b = (torch.randn(4, 7, 8) * 3 + 20).to(dtype), vector(1).float(), vector(2).float()
    module = written(FORMS[F.layer_norm], -1, x)
    with torch.autocast("cpu", torch.bfloat16):
        got, wanted = living(module(x, (8,), w, b), -1), F.layer_norm(living(x, -1), (5,), w[LIVE], b[LIVE])
    tolerance = max(torch.finfo(dtype).eps, 1e-5)
    torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance)


def test_a_copy_has_its_live_channels_and_a_state_dict_has_not():
    module = written(FORMS[F.layer_norm], -1, images(-1))
    twin = copy.deepcopy(module)
    module.write(torch.ones(8, dtype=torch.bool))
    assert twin.count == 5 and torch.equal(twin.live.bool(), LIVE)
    assert not module.state_dict()
    assert "8 of 8 channels" in repr(module)


@pytest.mark.filterwarnings("ignore:.*degrees of freedom")
@pytest.mark.parametrize("compiling", [False, True])
@pytest.mark.parametrize("function", [torch.var, torch.std, torch.var_mean, torch.std_mean])
def test_a_variance_without_degrees_of_freedom_is_what_torch_gives(function, compiling, monkeypatch):
    """NaN for one channel, infinite if more is taken off than there is."""
    x = images(-1)
    module = FORMS[function](8, -1, x)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
    for count in (1, 2, 3):
        module.write(torch.arange(8) < count)
        for correction in (0, 1, 2, 3, 5):
            for dim in (-1, (1, 2), None):
                found = function(x[..., :count], dim, correction=correction)
                got = module(x, dim, correction=correction)
                torch.testing.assert_close(got, found, equal_nan=True, rtol=1e-6, atol=1e-6)


def test_a_group_norm_over_channels_that_are_there_twice():
    """Its statistic has one entry a position in a group, though the input has the same labels in each group."""

    def forward(m, x):
        y = m.a(x)
        return m.b(m.norm(torch.cat([y, y.relu()], 1)))

    model = Net(forward, a=conv(3, 6), norm=nn.GroupNorm(2, 12), b=conv(12, 4)).double()
    assert assert_exact(model, (image().double(),)).analysis.channel_map.size == 6
