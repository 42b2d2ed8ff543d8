"""Where saliency modules go, and what a model with them returns."""

import copy
from collections.abc import Callable

import pytest
import timm
import torch
from timm.layers import BatchNormAct2d, LayerNorm2d
from torch import Tensor, nn

import autogate
from autogate import adaptive
from autogate.saliency import SALIENCY, saliency_of
from tests.autogate.saliency.nets import IMAGES, Branches, Tokens, chain, choose, lively


def chosen(model: nn.Module) -> list[str]:
    return list(saliency_of(model).paths)


@pytest.mark.parametrize("make", [chain, Branches, Tokens, lambda: timm.create_model("test_efficientnet", in_chans=3)])
def test_prepare_changes_no_output(make):
    model, images = lively(make()), torch.randn(2, 3, 32, 32)
    wanted = model(images)
    assert adaptive.prepare(model, images, flops=0.9) is model
    assert torch.equal(model(images), wanted)


def test_regular_convolutions_get_a_module():
    model = adaptive.prepare(Branches(), IMAGES, flops=0.9)
    assert chosen(model) == ["stem.0", "down", "branch.0", "project", "left.0", "join"]
    assert [layer.kind for layer in saliency_of(model).counting.layers].count("follows") == 1


def test_hidden_units_of_linear_layers_get_a_module():
    bank = saliency_of(adaptive.prepare(Tokens(), IMAGES, flops=0.9))
    assert {layer.path: layer.kind for layer in bank.counting.layers} == {
        "patch": "chosen", "fc1": "chosen", "fc2": "reads", "gate": "chosen", "value": "follows", "out": "reads",
        "head": "whole",
    }  # fmt: skip


def test_a_linear_layer_is_scaled_as_equation_3_says():
    """The mean is over the tokens of an image."""
    model = adaptive.prepare(lively(Tokens()), IMAGES, flops=0.9)
    choose(model)
    x = torch.randn(2, 5, 16)
    module = model.fc1.saliency
    s = 1 + torch.relu(x.mean(1) @ module.reduce.weight.T) @ module.expand.weight.T + module.expand.bias
    on = module.decisive(s) > 0
    wanted = (s * on)[:, None] * nn.functional.linear(x, model.fc1.weight, model.fc1.bias)
    assert torch.allclose(model.fc1(x), wanted, atol=1e-5) and on.any() and not on.all()


class Rows(nn.Module):
    """An MLP whose first dimension isn't that of the images: windows, or tokens before images."""

    def __init__(self, before: Callable[[Tensor], Tensor], after: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.stem, self.fc1, self.fc2 = nn.Conv2d(3, 8, 2, 2), nn.Linear(8, 24), nn.Linear(24, 2)
        self.before, self.after = before, after

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(self.before(self.stem(x).flatten(2).transpose(1, 2)))
        return self.after(self.fc2(x.relu()))


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (lambda x: x.unflatten(1, (4, 16)).flatten(0, 1), lambda x: x.unflatten(0, (-1, 4)).mean((1, 2))),
        (lambda x: x.transpose(0, 1), lambda x: x.mean(0)),
    ],
    ids=["windows", "tokens first"],
)
def test_a_linear_layer_with_other_rows_than_images_runs_whole(before, after):
    bank = saliency_of(adaptive.prepare(Rows(before, after), IMAGES, flops=0.9))
    assert [layer.kind for layer in bank.counting.layers] == ["chosen", "whole", "whole"]


def test_as_many_tokens_as_images_are_not_taken_for_them():
    model = Rows(lambda x: x.transpose(0, 1), lambda x: x.mean(0))
    with pytest.raises(autogate.AutogateError, match="fc1: the first dimension of its input isn't that of the images"):
        adaptive.prepare(
            nn.Sequential(nn.AdaptiveAvgPool2d(2), model), torch.randn(1, 3, 8, 8), flops=0.9, ignore="1.stem"
        )


def test_behind_a_norm_channels_are_scaled_as_equation_3_says():
    for norm in (nn.BatchNorm2d(8), BatchNormAct2d(8, act_layer=nn.SiLU), nn.Identity()):
        conv = nn.Conv2d(3, 8, 3)
        model = nn.Sequential(conv, norm, nn.Conv2d(8, 16, 3), nn.Flatten(), nn.Linear(16 * 144, 2))
        lively(model)
        plain = copy.deepcopy(norm)
        if isinstance(plain, BatchNormAct2d):
            plain.act = nn.Identity()
        adaptive.prepare(model, IMAGES, flops=0.9)
        choose(model)
        s = conv.saliency(IMAGES)
        on = conv.saliency.decisive(s) > 0
        wanted = (s * on)[..., None, None] * plain(nn.functional.conv2d(IMAGES, conv.weight, conv.bias))
        wanted = nn.functional.silu(wanted) if isinstance(norm, BatchNormAct2d) else wanted
        assert torch.allclose(model[:2](IMAGES), wanted, atol=1e-6)
        assert on.any() and not on.all()


def test_a_norm_across_channels_sees_zeros_where_channels_are_off():
    """So the convolution need not compute them."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), LayerNorm2d(8), nn.Conv2d(8, 16, 3), nn.Flatten(), nn.Linear(2304, 2))
    adaptive.prepare(lively(model), IMAGES, flops=0.9)
    choose(model)
    s, plain = model[0].saliency(IMAGES), LayerNorm2d(8)
    code = (model[0].saliency.decisive(s) > 0)[..., None, None]
    conv = nn.functional.conv2d(IMAGES, model[0].weight, model[0].bias)
    assert torch.allclose(model[:2](IMAGES), s[..., None, None] * code * plain(code * conv), atol=1e-6)


def test_a_norm_over_groups_of_channels_sees_zeros_too():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(4, 8), nn.Conv2d(8, 16, 3), nn.Flatten(), nn.Linear(2304, 2))
    adaptive.prepare(lively(model), IMAGES, flops=0.9)
    choose(model)
    s = model[0].saliency(IMAGES)
    on = (model[0].saliency.decisive(s) > 0)[..., None, None]
    conv = nn.functional.conv2d(IMAGES, model[0].weight, model[0].bias)
    wanted = s[..., None, None] * on * nn.GroupNorm(4, 8)(on * conv)
    assert torch.allclose(model[:2](IMAGES), wanted, atol=1e-6)


def test_a_depthwise_convolution_follows_its_channels():
    model = adaptive.prepare(lively(Branches()), IMAGES, flops=0.9)
    choose(model)
    with torch.no_grad():
        model(IMAGES)
        made = model.depthwise(model.branch(IMAGES.repeat(1, 6, 1, 1)[:, :16]))
    is_open = model.branch[0].saliency.open
    assert torch.equal(made.flatten(2).ne(0).any(2), is_open)
    assert not is_open.all()


class Depthwise(nn.Module):
    """A depthwise convolution on what `before` makes, and a norm across channels."""

    def __init__(self, channels: int, before: Callable[[nn.Module, Tensor], Tensor]):
        super().__init__()
        self.stem, self.before = nn.Conv2d(3, 16, 3, padding=1), before
        self.grouped = nn.Sequential(nn.Conv2d(3, 12, 1), nn.Conv2d(12, 16, 3, padding=1, groups=4))
        self.depthwise = nn.Conv2d(channels, channels, 3, groups=channels)
        self.norm, self.last = LayerNorm2d(channels), nn.Conv2d(channels, 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(self.depthwise(self.before(self, x)))).mean((2, 3))


def test_a_norm_across_channels_behind_a_depthwise_convolution_sees_zeros():
    model = adaptive.prepare(Depthwise(16, lambda m, x: m.stem(x)).eval(), IMAGES, flops=0.9)
    choose(model)
    seen = []
    model.norm.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        model(IMAGES)
    on = model.stem.saliency.open
    assert torch.equal(seen[0].ne(0).any(3).any(2), on) and not on.all()


@pytest.mark.parametrize(
    ("channels", "before"),
    [
        (19, lambda m, x: torch.cat([m.stem(x), x], 1)),
        (32, lambda m, x: torch.cat([m.stem(x), m.grouped(x)], 1)),
    ],
)
def test_a_depthwise_convolution_computes_channels_that_no_module_chooses(channels, before):
    model = Depthwise(channels, before).eval()
    with torch.no_grad():
        wanted = model(IMAGES)
        adaptive.prepare(model, IMAGES, flops=0.95)
        assert (model(IMAGES) - wanted).abs().max() < 1e-6
    choose(model)
    with torch.no_grad():
        model(IMAGES)
    opened = model.depthwise.saliency.open
    assert torch.equal(opened[:, :16], model.stem.saliency.open) and not opened[:, :16].all()
    assert opened[:, 16:].all()


def test_where_a_layer_that_runs_whole_adds_to_its_channels_a_depthwise_convolution_runs_whole():
    model = Depthwise(16, lambda m, x: m.stem(x) + m.grouped(x)).eval()
    adaptive.prepare(model, IMAGES, flops=0.95)
    kinds = {layer.path: layer.kind for layer in saliency_of(model).counting.layers}
    assert (kinds["stem"], kinds["depthwise"]) == ("chosen", "whole")


def test_a_convolution_that_two_norms_follow_is_scaled_itself():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.a, self.b = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.BatchNorm2d(8)
            self.last = nn.Conv2d(8, 4, 3)

        def forward(self, x):
            x = self.conv(x)
            return self.last(self.a(x) + self.b(x))

    model = adaptive.prepare(lively(Two()), IMAGES, flops=0.9)
    choose(model)
    assert torch.equal(model.conv(IMAGES).flatten(2).ne(0).any(2), model.conv.saliency.open)


def test_a_block_is_no_norm_whatever_it_is_called():
    class NormFreeBlock(nn.Sequential):
        pass

    block = NormFreeBlock(nn.SiLU(), nn.Conv2d(8, 16, 3, 2))
    model = nn.Sequential(nn.Conv2d(3, 8, 3), block, nn.SiLU(), nn.Conv2d(16, 2, 3)).eval()
    wanted = model(IMAGES)
    assert torch.equal(adaptive.prepare(model, IMAGES, flops=0.9)(IMAGES), wanted)


def test_ignored_layers_are_computed_whole():
    model = adaptive.prepare(chain(), IMAGES, flops=0.9, ignore="3")
    assert chosen(model) == ["5"]  # 3 and what it reads


def test_a_module_that_would_cost_too_much_is_left_out():
    model = nn.Sequential(nn.Conv2d(3, 32, 3), nn.AdaptiveAvgPool2d(1), nn.Conv2d(32, 32, 1), nn.Conv2d(32, 2, 1))
    assert chosen(adaptive.prepare(model, IMAGES, flops=0.9)) == ["0"]


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            nn.Sequential(nn.Flatten(), nn.Linear(768, 8), nn.ReLU(), nn.Linear(8, 2)),
            "no layer that could choose",
        ),
        (nn.Sequential(nn.Conv2d(3, 4, 3)), "all of its outputs are needed"),
        (
            nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 64, 3, groups=2)),
            "flops is 0.5, and 88.[0-9]% .* runs whole for every image: 1. Ask",
        ),
    ],
)
def test_models_that_cannot_choose_are_refused_and_left_as_they_were(model, message):
    before = {name: dict(module.__dict__) for name, module in model.named_modules()}
    hooks = {name: len(module._forward_hooks) for name, module in model.named_modules()}
    with pytest.raises(autogate.AutogateError, match=message):
        adaptive.prepare(model, IMAGES, flops=0.5)
    assert before.keys() == dict(model.named_modules()).keys()
    assert hooks == {name: len(module._forward_hooks) for name, module in model.named_modules()}
    assert all(not module._forward_pre_hooks for module in model.modules())


def test_a_model_is_prepared_once():
    model = adaptive.prepare(chain(), IMAGES, flops=0.9)
    with pytest.raises(autogate.AutogateError, match="has saliency modules"):
        adaptive.prepare(model, IMAGES, flops=0.9)
    with pytest.raises(autogate.AutogateError, match="already prepared"):
        adaptive.prepare(autogate.prepare(chain(), IMAGES, flops=0.9), IMAGES, flops=0.9)
    with pytest.raises(autogate.AutogateError, match="has saliency modules"):
        autogate.prepare(model, IMAGES, flops=0.9)


def test_names_and_classes_stay():
    model, before = Branches(), Branches()
    adaptive.prepare(model, IMAGES, flops=0.9)
    assert type(model) is Branches
    own = {name for name in model.state_dict() if ".saliency." not in name and not name.startswith(SALIENCY)}
    assert own == set(before.state_dict())
    assert [type(m) for n, m in model.named_modules() if "saliency" not in n] == [type(m) for m in before.modules()]
