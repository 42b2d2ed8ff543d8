"""Prototypes: a few codes for all images, and stages that run images in groups."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import autogate
from autogate import adaptive
from autogate.skipping.prototypes import Prototypes, chosen
from autogate.skipping.stages import StageForward
from benchmarks.adaptive_time import draw_codes, noise
from tests.autogate.saliency.nets import chain, lively

IMAGES = noise(12, 16)


class Stages(nn.Module):
    """A stem and two stages of two convolutions each, the second with a residual add."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
        self.first, self.second = self._stage(16, 24), Residual(24)
        self.head = nn.Linear(24, 5)

    @staticmethod
    def _stage(inputs: int, outputs: int) -> nn.Sequential:
        return nn.Sequential(
            nn.Conv2d(inputs, 32, 3, 2, 1), nn.BatchNorm2d(32), nn.ReLU(),
            nn.Conv2d(32, outputs, 3, 1, 1), nn.BatchNorm2d(outputs), nn.ReLU(),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(self.stem(x))).mean((2, 3)))


class Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = Stages._stage(channels, channels)
        self.down = nn.Conv2d(channels, channels, 2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) + self.down(x)


class Blocks(nn.Module):
    """Patches as tokens, and two MLPs on them."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.head = nn.Conv2d(3, 16, 2, 2), nn.Linear(16, 5)
        self.blocks = nn.Sequential(self._mlp(), self._mlp())

    @staticmethod
    def _mlp() -> nn.Sequential:
        return nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 16))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.patch(x).flatten(2).transpose(1, 2)).mean(1))


def prepared(model: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    model = adaptive.prepare(lively(model), IMAGES, flops=0.9)
    draw_codes(model, IMAGES, 0.5)
    return model


def stages(model: nn.Module) -> dict[str, StageForward]:
    found = ((path, module.__dict__.get("forward")) for path, module in model.named_modules())
    return {path: forward for path, forward in found if isinstance(forward, StageForward)}


def run(model: nn.Module, images: Tensor) -> Tensor:
    with torch.inference_mode():
        return model(images)


def test_images_with_like_codes_share_a_prototype():
    random = torch.Generator().manual_seed(0)
    kind = torch.arange(40) % 2
    codes = {3: torch.zeros(40, 6, dtype=torch.bool), 7: torch.zeros(40, 4, dtype=torch.bool)}
    codes[3][kind == 0, :3], codes[3][kind == 1, 3:], codes[7][:, 1] = True, True, True
    descriptors = torch.randn(40, 5, generator=random) + 4.0 * kind[:, None]
    found = chosen(codes, descriptors, 2)
    of = found.of(descriptors)
    assert len(found) == 2 and torch.equal(of == of[0], kind == 0)
    for layer, code in codes.items():
        assert torch.equal(found.codes[layer][of], code)


def test_prototypes_have_as_many_channels_as_images_use():
    random = torch.Generator().manual_seed(0)
    codes = {0: torch.rand(50, 30, generator=random) < torch.linspace(0, 1, 30)}
    descriptors = torch.randn(50, 4, generator=random)
    found = chosen(codes, descriptors, 3)
    computed = float(found.codes[0][found.of(descriptors)].sum())
    assert computed == pytest.approx(float(codes[0].sum()), rel=0.05)
    assert len(chosen(codes, descriptors, 1)) == 1


def test_a_prototype_with_all_channels_changes_nothing():
    model = prepared(Stages())
    wanted = run(model, IMAGES)
    fast = adaptive.finalize(model, batches=[IMAGES], prototypes=3, break_even=1, warn=False)
    for forward in stages(fast).values():
        known = forward.prototypes
        codes = {layer: torch.ones_like(code) for layer, code in known.codes.items()}
        forward.prototypes = Prototypes(codes, known.weight, known.bias)
    assert torch.allclose(run(fast, IMAGES), wanted, atol=1e-5)


def test_an_image_gives_the_same_in_any_batch():
    model = prepared(Stages())
    before = run(model, IMAGES)
    fast = adaptive.finalize(model, batches=[(IMAGES, None)], prototypes=3, break_even=1, warn=False)
    assert list(stages(fast)) == ["first", "second"]
    together = run(fast, IMAGES)
    assert not torch.allclose(together, before, atol=1e-4)
    assert torch.allclose(torch.cat([run(fast, image[None]) for image in IMAGES]), together, atol=1e-5)
    assert torch.allclose(run(fast, IMAGES.flip(0)), together.flip(0), atol=1e-5)
    assert torch.allclose(run(copy.deepcopy(fast), IMAGES), together, atol=1e-6)


def test_stages_of_tokens_group_images_at_any_resolution():
    model = prepared(Blocks())
    fast = adaptive.finalize(model, batches=[IMAGES], prototypes=3, break_even=1, warn=False)
    assert list(stages(fast)) == ["blocks"] and len(stages(fast)["blocks"].prototypes) > 1
    for images in (IMAGES, noise(4, 24)):
        assert torch.allclose(torch.cat([run(fast, image[None]) for image in images]), run(fast, images), atol=1e-5)


@pytest.mark.parametrize("make", [Stages, Blocks])
def test_exported_images_have_their_prototypes(make):
    fast = adaptive.finalize(prepared(make()), batches=[IMAGES], prototypes=3, break_even=1, warn=False)
    with torch.no_grad():
        exported = torch.export.export(fast, (IMAGES,)).module()
    assert torch.allclose(exported(IMAGES), run(fast, IMAGES), atol=1e-5)


def test_what_groups_multiply_is_what_is_counted():
    fast = adaptive.finalize(prepared(Stages()), batches=[IMAGES], prototypes=2, break_even=1, warn=False)
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        fast(IMAGES[:1])
    convolved = counter.get_flop_counts()["Global"][torch.ops.aten.convolution] / 2
    bank = adaptive.bank(fast)
    others = fast.head.weight.numel() + sum(module.macs for module in bank.saliency_modules)
    assert convolved + others == pytest.approx(float(adaptive.cost(fast)), rel=0.02)
    fast(IMAGES)
    assert adaptive.cost(fast).shape == (12,)


def test_the_agreement_is_told():
    fast = adaptive.finalize(prepared(Stages()), batches=[IMAGES], prototypes=2, break_even=1, warn=False)
    found = adaptive.grouping(fast)
    assert found.stages == (("first", 2), ("second", 2)) and found.images == 12
    assert 0.5 < found.kept < 1 and 0 < found.same <= 1
    assert str(found).startswith("prototypes of first (2), second (2). On 12 images they have ")
    assert adaptive.grouping(prepared(chain())) is None


def test_another_budget_gets_other_prototypes():
    fast = adaptive.finalize(prepared(Stages()), batches=[IMAGES], prototypes=2, break_even=1, warn=False)
    before, first = stages(fast)["first"].prototypes, adaptive.grouping(fast).cost
    share = adaptive.budget(fast, flops=0.7 * first, batches=iter([IMAGES]))
    assert share == adaptive.grouping(fast).cost < 0.9 * first
    assert stages(fast)["first"].prototypes is not before and len(stages(fast)) == 2


def test_gradients_and_training_know_no_groups():
    model = prepared(Stages())
    fast = adaptive.finalize(copy.deepcopy(model), batches=[IMAGES], prototypes=2, break_even=1, warn=False)
    assert torch.allclose(fast(IMAGES), model(IMAGES), atol=1e-5)  # all channels that some image uses are there


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"prototypes": 2}, "batches are missing"),
        ({"prototypes": 0, "batches": [IMAGES]}, "prototypes is 0"),
        ({"prototypes": 2, "batches": [IMAGES]}, "takes one feature map"),
    ],
)
def test_prototypes_that_cannot_be_had_are_told(options, match):
    model = prepared(chain())
    names = list(model.state_dict())
    with pytest.raises(autogate.AutogateError, match=match):
        adaptive.finalize(model, warn=False, **options)
    assert list(model.state_dict()) == names and "forward" not in model[0].__dict__


def test_a_module_whose_depthwise_convolution_follows_one_outside_is_no_stage():
    model = Stages()
    model.first = nn.Sequential(nn.Conv2d(16, 16, 3, 1, 1, groups=16), nn.BatchNorm2d(16), *model.first)
    torch.manual_seed(0)
    model = adaptive.prepare(lively(model), IMAGES, flops=0.95)
    draw_codes(model, IMAGES, 0.5)
    grouped = adaptive.finalize(model, batches=[IMAGES], prototypes=3, break_even=1, warn=False)
    assert [path for path, _ in adaptive.grouping(grouped).stages] == ["second"]
