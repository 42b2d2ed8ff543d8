"""The cost of images, against a count of what the masked network multiplies."""

import pytest
import torch
from torch import Tensor, nn

import autogate
from autogate import adaptive
from autogate.saliency import saliency_of
from tests.autogate.saliency.nets import IMAGES, Branches, Tokens, chain, choose, lively


class Shared(nn.Module):
    """A convolution that runs twice, with another norm each time."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv, self.head = nn.Conv2d(3, 12, 3), nn.Conv2d(12, 12, 3, padding=1), nn.Conv2d(12, 4, 1)
        self.norms = nn.ModuleList([nn.BatchNorm2d(12), nn.BatchNorm2d(12)])

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.silu(self.stem(x))
        for norm in self.norms:
            x = nn.functional.silu(norm(self.conv(x)))
        return self.head(x)


class Frames(nn.Module):
    """Two frames of each image go through the network as images of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3)
        self.body, self.head = nn.Conv2d(12, 16, 3), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.silu(self.stem(x))
        x = nn.functional.silu(self.body(torch.stack([x, -x], 1).flatten(0, 1)))
        return self.head(x.mean((2, 3)).view(-1, 2, 16).sum(1))


def multiplied(model: nn.Module, image: Tensor) -> float:
    """Multiply-adds of one image: in each layer, channels that are read and aren't zero, times those that are
    computed."""
    total = 0.0

    def count(module: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
        nonlocal total
        x, saliency = args[0], getattr(module, "saliency", None)
        if isinstance(module, nn.Linear):
            x, output = x.movedim(-1, 1), output.movedim(-1, 1)
        positions, read = output[0, 0].numel(), x[..., None].flatten(2).ne(0).any(2).sum(1)
        if getattr(module, "groups", 1) > 1:
            total += float(module.weight[0].numel() * positions * read.sum())
            return
        made = len(module.weight) if saliency is None else saliency.open.sum(1)
        total += float(module.weight[0, 0].numel() * positions * (read * made).sum())
        total += len(x) * getattr(saliency, "macs", 0)

    layers = [
        module for path, module in model.named_modules()
        if isinstance(module, (nn.Conv2d, nn.Linear)) and "saliency" not in path
    ]  # fmt: skip
    handles = [layer.register_forward_hook(count) for layer in layers]
    with torch.no_grad():
        model(image[None])
    for handle in handles:
        handle.remove()
    return total


@pytest.mark.parametrize("make", [chain, Branches, Tokens])
def test_the_cost_is_what_the_masked_network_multiplies(make):
    model = adaptive.prepare(lively(make()), IMAGES, flops=0.9)
    assert adaptive_costs(model).unique().numel() == 1  # all channels are computed
    choose(model)
    found = adaptive_costs(model)
    assert found.tolist() == [multiplied(model, image) for image in IMAGES]
    assert found.unique().numel() > 1


def adaptive_costs(model: nn.Module) -> Tensor:
    with torch.no_grad():
        model.eval()(IMAGES)
    return adaptive.cost(model)


def test_the_cost_is_right_at_another_resolution():
    model = adaptive.prepare(lively(Branches()), IMAGES, flops=0.9)
    choose(model)
    images = torch.randn(2, 3, 24, 20)
    with torch.no_grad():
        model(images)
    assert adaptive.cost(model).tolist() == [multiplied(model, image) for image in images]


def test_without_a_choice_it_is_the_dense_cost_and_the_modules():
    model = adaptive.prepare(lively(Branches()), IMAGES, flops=0.9)
    bank, dense = saliency_of(model), 0.0
    adaptive_costs(model)
    for name, parameter in Branches().named_parameters():
        if parameter.ndim > 1:
            positions = {"stem": 256, "branch": 256, "head": 1}.get(name.split(".")[0], 64)
            dense += parameter.numel() * positions
    assert bank.cost_of_images().dense == dense
    assert adaptive.cost(model).tolist() == [dense + sum(module.macs for module in bank.saliency_modules)] * 3


def test_frames_count_for_their_image():
    model = adaptive.prepare(lively(Frames()), IMAGES, flops=0.9)
    choose(model)
    assert adaptive_costs(model).tolist() == [multiplied(model, image) for image in IMAGES]


def test_rows_that_are_no_multiple_of_the_images_count_as_their_mean():
    class Boxes(Frames):
        def forward(self, x: Tensor) -> Tensor:
            x = nn.functional.silu(self.stem(x))
            return self.head(nn.functional.silu(self.body(torch.cat([x, x[:1]]))).mean((2, 3)))

    model = adaptive.prepare(lively(Boxes()), IMAGES, flops=0.9)
    choose(model)
    assert adaptive_costs(model).shape == (3,)


def test_a_layer_that_runs_twice_counts_at_least_what_it_multiplies():
    """What it reads is its own output, or not: channels that are zero in one of the calls count as read in both."""
    model = adaptive.prepare(lively(Shared()), IMAGES, flops=0.9)
    dense = adaptive_costs(model)
    choose(model)
    found = adaptive_costs(model)
    assert all(multiplied(model, image) <= cost for image, cost in zip(IMAGES, found.tolist(), strict=True))
    assert (found < dense).all()


def test_a_channel_that_is_not_zero_when_it_is_off_is_read():
    """A batch norm that comes after the one behind the convolution makes a constant of it."""
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3),
        nn.BatchNorm2d(16),
        nn.BatchNorm2d(16),
        nn.Conv2d(16, 8, 3),
        nn.Flatten(),
        nn.Linear(1152, 2),
    )
    model = adaptive.prepare(lively(model), IMAGES, flops=0.9)
    choose(model)
    assert adaptive_costs(model).tolist() == [multiplied(model, image) for image in IMAGES]
    assert not saliency_of(model).counting.zero[:16].any()


def test_what_a_norm_will_shift_is_known_before_it_is_trained():
    """Before training the second norm leaves zeros as they are."""
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(),
        nn.Conv2d(16, 2, 3),
    )  # fmt: skip
    before = {name: value.clone() for name, value in model.state_dict().items()}
    zero = saliency_of(adaptive.prepare(model, IMAGES, flops=0.9)).counting.zero
    assert zero.tolist() == [False] * 16 + [True] * 16
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())


def test_what_statistics_across_channels_make_of_a_zero_is_read():
    """With all channels off it is zero, with some of them on it isn't."""

    class Centred(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 4, 3)

        def forward(self, x):
            x = self.first(x).relu()
            return self.last(x - x.mean(1, keepdim=True))

    model = adaptive.prepare(Centred(), IMAGES, flops=0.9)
    assert not saliency_of(model).counting.zero.any()


@pytest.mark.parametrize("score", [torch.nan, torch.inf])
def test_nan_and_infinite_scores_are_told_with_their_layer(score):
    model = adaptive.prepare(chain().eval(), IMAGES, flops=0.9)
    with torch.no_grad():
        model[3].saliency.expand.bias[2] = score
        model(IMAGES)
    with pytest.raises(autogate.AutogateError, match="3: its saliency scores are NaN or infinite"):
        adaptive.cost(model)


def test_without_a_forward_there_is_no_cost():
    model = adaptive.prepare(chain(), IMAGES, flops=0.9)
    with pytest.raises(autogate.AutogateError, match="no forward has run"):
        adaptive.cost(model)
