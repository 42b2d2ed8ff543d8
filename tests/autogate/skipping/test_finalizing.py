"""Finalized models that choose for each image: the same outputs, and less is multiplied."""

import copy
import pickle
import warnings

import pytest
import timm
import torch
from timm.layers import LayerNorm2d
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import autogate
from autogate import adaptive
from autogate.skipping import forwards_in
from benchmarks.adaptive_time import draw_codes, noise
from tests.autogate.saliency.nets import IMAGES, Branches, Tokens, chain, lively


def prepared(model: nn.Module, images: Tensor = IMAGES, share: float = 0.5) -> nn.Module:
    torch.manual_seed(0)
    model = adaptive.prepare(lively(model), images, flops=0.9)
    draw_codes(model, images, share)
    return model


def outputs(model: nn.Module, *batches: Tensor) -> list[Tensor]:
    with torch.inference_mode():
        return [model(batch) for batch in batches]


def assert_close(found: list[Tensor], wanted: list[Tensor], tolerance: float = 1e-5) -> None:
    for one, other in zip(found, wanted, strict=True):
        assert (one - other).abs().max() <= tolerance * other.abs().max()


def assert_skips_exactly(model: nn.Module, images: Tensor, tolerance: float = 1e-5) -> None:
    """Batches of one, of several and of equal images, other resolutions, codes as drawn, all off, one on, all on."""
    larger = F.interpolate(images, scale_factor=1.5)
    batches = images, images[:1], images[1:].repeat(2, 1, 1, 1), images[:1].repeat(3, 1, 1, 1), larger
    masked = copy.deepcopy(model)
    fast = adaptive.finalize(model, break_even=1, warn=False)
    assert forwards_in(fast)
    for on in (None, 0, 1, 10**6):
        for one in (masked, fast):
            for module in adaptive.bank(one).saliency_modules if on is not None else ():
                nn.init.zeros_(module.expand.weight)
                with torch.no_grad():
                    module.expand.bias.fill_(-2.0)[:on] = 0.5
        assert_close(outputs(fast, *batches), outputs(masked, *batches), tolerance)
        assert torch.equal(adaptive.cost(fast), adaptive.cost(masked))


class Twice(nn.Module):
    """A convolution that is called twice before anything reads it: for all images, or for one and then for all."""

    def __init__(self, alone: bool) -> None:
        super().__init__()
        self.shared, self.last, self.alone = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 8, 3), alone

    def forward(self, x: Tensor) -> Tensor:
        first = self.shared(-x[:1] if self.alone else -x).relu()
        return (self.last(self.shared(x).relu()) + self.last(first)).mean((2, 3))


@pytest.mark.parametrize("make", [Branches, chain, Tokens])
def test_what_skips_returns_what_is_masked(make):
    assert_skips_exactly(prepared(make()), IMAGES)


@pytest.mark.parametrize("alone", [False, True])
def test_a_layer_that_is_called_twice_is_read_whole(alone):
    assert_skips_exactly(prepared(Twice(alone)), IMAGES)


class Sized(nn.Module):
    """A forward that holds the number of its channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body = nn.Conv2d(3, 32, 3, padding=1), nn.Conv2d(16, 32, 3, padding=1)
        self.norm, self.last = nn.BatchNorm2d(32), nn.Conv2d(32, 16, 3)

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.stem(x).relu().split(16, 1)
        x = self.norm(self.body(left)).relu()
        x = x.reshape(len(x), 2, 16, *x.shape[2:]).transpose(1, 2).flatten(1, 2)
        return self.last(x).mean((2, 3)) + right.mean((2, 3))


def test_a_depthwise_convolution_before_a_norm_across_channels_skips_exactly():
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3, groups=16), LayerNorm2d(16), nn.Conv2d(16, 8, 3),
        nn.AdaptiveAvgPool2d(1),
    )  # fmt: skip
    assert_skips_exactly(prepared(model), IMAGES)


def test_an_example_whose_scores_overflow_is_told():
    model = prepared(chain())
    with pytest.raises(autogate.AutogateError, match="saliency scores are NaN or infinite"):
        adaptive.finalize(model, IMAGES * 1e30, batches=[IMAGES], warn=False)
    assert not forwards_in(model)


class UNet(nn.Module):
    """Two levels, with a skip that is concatenated, and a transposed convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.low = self._block(3, 16), self._block(16, 32)
        self.up, self.join, self.head = nn.ConvTranspose2d(32, 16, 2, 2), self._block(32, 16), nn.Conv2d(16, 2, 1)

    @staticmethod
    def _block(inputs: int, outputs: int) -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        high = self.down(x)
        return self.head(self.join(torch.cat([high, self.up(self.low(F.max_pool2d(high, 2)))], 1)))


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "resnet18", "vgg11_bn", "mobilenetv2_050", "efficientnet_b0", "tf_efficientnet_lite0",
        "regnetx_002", "regnety_002", "densenet121", "convnext_atto", "Sized", "UNet",
    ],
)  # fmt: skip
def test_real_networks_skip_exactly(name):
    model = globals()[name]() if name in globals() else timm.create_model(name, num_classes=10)
    images = noise(3, 64).double()  # untrained, they magnify float32's rounding to 1e-4
    assert_skips_exactly(prepared(model.double(), images), images, 1e-9)


@pytest.mark.parametrize("make", [chain, Tokens])
@pytest.mark.parametrize("batches", [None, [IMAGES]])
def test_what_is_off_is_not_multiplied(make, batches):
    model = adaptive.finalize(prepared(make()), batches=batches, break_even=1, warn=False)
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        model(IMAGES[:1])
    multiplied = counter.get_total_flops() / 2
    assert multiplied == pytest.approx(float(adaptive.cost(model)))
    assert multiplied < 0.75 * adaptive.bank(model).cost_of_images().dense


def test_channels_that_no_image_uses_are_removed():
    model = prepared(Branches())
    with torch.no_grad():
        model.left[0].saliency.expand.weight[:2], model.left[0].saliency.expand.bias[:2] = 0, -2
    before, use = copy.deepcopy(model), {layer.path: layer for layer in adaptive.use(model, [IMAGES]).layers}
    wanted = outputs(model, IMAGES, IMAGES[:1])
    share = (adaptive.cost(model) / adaptive.bank(model).cost_of_images().dense).mean()
    slim = adaptive.finalize(model, batches=[(IMAGES[:2], 0), (IMAGES[2:], 0)], break_even=1, warn=False)
    assert slim is model and type(slim.stem[0]) is nn.Conv2d
    assert slim.branch[0].out_channels == 24 - use["branch.0"].never
    assert slim.depthwise[0].groups == slim.branch[0].out_channels
    assert sum(p.numel() for p in slim.parameters()) < sum(p.numel() for p in before.parameters())
    assert_close(outputs(slim, IMAGES, IMAGES[:1]), wanted)
    assert autogate.summary(slim).images == 1  # of its latest forward: what was measured before is of wider layers
    slim(IMAGES)
    now = (adaptive.cost(slim) / adaptive.bank(slim).cost_of_images().dense).mean()
    assert share / 2 < now < share  # of the FLOPs of the model as it was prepared; what runs whole is narrower
    left = {layer.path: layer.never for layer in adaptive.use(slim, [IMAGES]).layers}
    assert left["stem.0"] == left["branch.0"] == 0 < use["stem.0"].never
    assert left["left.0"] == use["left.0"].never > 0  # a norm across channels counts them


def test_training_goes_on_masked():
    model = prepared(Branches())
    masked = copy.deepcopy(model)
    fast = adaptive.finalize(model, break_even=1, warn=False)
    for one in (masked, fast):
        torch.manual_seed(5)
        one.train()(IMAGES).square().mean().backward()
        torch.optim.SGD(one.parameters(), lr=1e-3).step()
    for (name, one), other in zip(fast.named_parameters(), masked.parameters(), strict=True):
        assert torch.equal(one, other), name
    assert_close(outputs(fast.eval(), IMAGES), outputs(masked.eval(), IMAGES))
    fast.train()
    fast.zero_grad()
    fast.eval()(IMAGES).sum().backward()
    assert all(p.grad is not None for name, p in fast.named_parameters() if "saliency" not in name)


def test_an_optimizer_of_replaced_parameters_is_told():
    model = prepared(Branches())
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    adaptive.finalize(model, batches=[IMAGES], break_even=1, warn=False)
    model.train()(IMAGES).square().mean().backward()
    with pytest.warns(UserWarning, match="are no longer the model's"):
        optimizer.step()


def test_masked_and_skipping_layers_may_be_mixed():
    model = prepared(Branches())
    fast = adaptive.finalize(copy.deepcopy(model), break_even=1, warn=False)
    for one in (model, fast):
        one.stem[0].train()  # its saliency module stays in eval mode: no noise
        one.stem[0].saliency.eval()
    assert_close(outputs(fast, IMAGES), outputs(model, IMAGES))


def test_a_part_of_the_model_runs_alone():
    model = prepared(Branches())
    fast = adaptive.finalize(copy.deepcopy(model), break_even=1, warn=False)
    fast(IMAGES)
    x = torch.randn(3, 16, 8, 8)
    assert_close(outputs(fast.branch, x), outputs(model.branch, x))


def test_hooks_on_convolutions_see_what_they_saw():
    model = prepared(chain())
    fast = adaptive.finalize(copy.deepcopy(model), break_even=1, warn=False)
    seen: list[Tensor] = []
    for one in (model, fast):
        one[0].register_forward_hook(lambda module, args, output: seen.append(output))
    assert_close(outputs(fast, IMAGES), outputs(model, IMAGES))
    wanted, found = seen[1], seen[0]
    on = found.flatten(2).ne(0).any(2)
    assert torch.allclose(found[on], wanted[on], atol=1e-5) and not on.all()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_skip_by_themselves(copied):
    fast = adaptive.finalize(prepared(Branches()), batches=[IMAGES], break_even=1, warn=False)
    wanted = outputs(fast, IMAGES)
    other = copied(fast)
    with torch.no_grad():
        for parameter in fast.parameters():
            parameter.fill_(torch.nan)
    assert_close(outputs(other, IMAGES), wanted, 0)
    assert all(forward.conv is other.get_submodule(path) for path, forward in forwards_in(other).items())


def test_a_budget_is_set_after_finalizing():
    model = prepared(Branches(), share=0.7)
    fast = adaptive.finalize(model, batches=[IMAGES], break_even=1, warn=False)
    with torch.inference_mode(), FlopCounterMode(display=False) as before:
        fast(IMAGES)
    assert adaptive.budget(fast, flops=0.3, batches=[IMAGES]) == pytest.approx(0.3, abs=0.05)
    with torch.inference_mode(), FlopCounterMode(display=False) as after:
        fast(IMAGES)
    assert after.get_total_flops() < 0.8 * before.get_total_flops()


def test_a_channel_that_is_off_and_read_as_something_else_than_zero_stays():
    """The sigmoid of zero is a half, and the classifier, which runs whole, adds it up."""
    layers = nn.Conv2d(3, 8, 3), nn.Sigmoid(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)
    model = prepared(nn.Sequential(*layers))
    nn.init.zeros_(model[0].saliency.expand.weight)
    with torch.no_grad():
        model[0].saliency.expand.bias[:4] = -2.0
    wanted = outputs(model, IMAGES, IMAGES[:1])
    fast = adaptive.finalize(model, batches=[IMAGES], break_even=1, warn=False)
    assert_close(outputs(fast, IMAGES, IMAGES[:1]), wanted)
    assert fast[4].in_features == 8


def test_measured_break_even_changes_no_output():
    model = prepared(Branches())
    wanted = outputs(model, IMAGES, IMAGES[:1])
    fast = autogate.finalize(model.train(), warn=False)
    assert model.training and model.stem[1].training
    model.eval()
    assert all(forward.break_even is not None for forward in forwards_in(fast).values())
    assert_close(outputs(fast, IMAGES, IMAGES[:1]), wanted)


def test_export_is_masked():
    fast = adaptive.finalize(prepared(chain()), break_even=1, warn=False)
    exported = torch.export.export(fast, (IMAGES,)).module()
    assert_close([exported(IMAGES)], outputs(fast, IMAGES))
    assert_close([torch.jit.trace(fast, IMAGES, check_trace=False)(IMAGES)], outputs(fast, IMAGES))


def test_training_that_is_not_over_is_told():
    model = adaptive.prepare(chain(), IMAGES, flops=0.9, steps=10)
    with pytest.warns(UserWarning, match="before the warm-up was over"):
        adaptive.finalize(copy.deepcopy(model))
    bank = adaptive.bank(model)
    bank.step_count.fill_(5)
    bank.cost.fill_(0.95)
    with pytest.warns(UserWarning, match="images take 95.0% of the FLOPs, the target is 90.0%"):
        autogate.finalize(copy.deepcopy(model))
    bank.step_count.fill_(10)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        autogate.finalize(model)


def test_a_failed_call_leaves_the_model_as_it_was():
    model = prepared(Branches())

    def refused(match: str, **options):
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(autogate.AutogateError, match=match):
            adaptive.finalize(model, warn=False, **options)
        after = model.state_dict()
        assert list(after) == list(before) and not forwards_in(model)
        assert all(torch.equal(value.nan_to_num(), before[name].nan_to_num()) for name, value in after.items())

    refused("yields none", batches=[])
    with torch.no_grad():
        model.left[0].saliency.expand.bias[3] = torch.nan
    refused("left.0.saliency.expand.bias")
    with torch.no_grad():
        model.left[0].saliency.expand.bias[3] = -5.0
    model.head = nn.Linear(24, 7)
    refused("has changed since", batches=[IMAGES])


def test_a_model_is_finalized_once():
    fast = adaptive.finalize(prepared(chain()), break_even=1, warn=False)
    with pytest.raises(autogate.AutogateError, match="finalized before"):
        autogate.finalize(fast)
