"""Small networks with channel maps written by hand, so that these tests need no capture."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from autogate.budget.products import Flops
from autogate.budget.targets import Target, Targets
from autogate.gating.bank import GateBank
from autogate.methods.gdp import GDP
from autogate.methods.learner import Learner
from autogate.methods.method import Method
from rewriters.labelling.channel_map import ChannelMap, Kernel, Side

WIDTHS = (16, 24, 24)


class ConvNet(nn.Module):
    """Three convolutions and a classifier; with `residual`, the third adds to the second's output.

    `gates`, if given, multiply the inputs of conv2, conv3 and fc: what a bank's folded gates must equal.
    """

    def __init__(self, widths: tuple[int, int, int] = WIDTHS, residual: bool = False):
        super().__init__()
        self.residual = residual
        self.conv1 = nn.Conv2d(3, widths[0], 3, padding=1)
        self.norm1 = nn.BatchNorm2d(widths[0])
        self.conv2 = nn.Conv2d(widths[0], widths[1], 3, padding=1)
        self.norm2 = nn.BatchNorm2d(widths[1])
        self.conv3 = nn.Conv2d(widths[1], widths[2], 3, padding=1)
        self.norm3 = nn.BatchNorm2d(widths[2])
        self.fc = nn.Linear(widths[2], 5)

    def forward(self, x: Tensor, gates: tuple[Tensor, Tensor, Tensor] | None = None) -> Tensor:
        def gated(y: Tensor, place: int) -> Tensor:
            return y if gates is None else y * gates[place].view(1, -1, *[1] * (y.ndim - 2))

        x = self.norm1(self.conv1(x)).relu()
        x = self.norm2(self.conv2(gated(x, 0))).relu()
        y = self.norm3(self.conv3(gated(x, 1))).relu()
        x = x + y if self.residual else y
        return self.fc(gated(x.mean((2, 3)), 2))


def conv_net_map(widths: tuple[int, int, int] = WIDTHS, pixels: int = 36, residual: bool = False) -> ChannelMap:
    """The classes of a ConvNet: one a channel, the second and third layers' coupled by the residual."""
    first, second = torch.arange(widths[0]), torch.arange(widths[1]) + widths[0]
    third = second if residual else torch.arange(widths[2]) + widths[0] + widths[1]
    classes = {}
    for number, labels in ((1, first), (2, second), (3, third)):
        classes[Side(f"conv{number}.weight", 0)] = labels
        classes[Side(f"conv{number}.bias", 0)] = labels
        for vector in ("weight", "bias", "running_mean", "running_var"):
            classes[Side(f"norm{number}.{vector}", 0)] = labels
    gated = (Side("conv2.weight", 1), Side("conv3.weight", 1), Side("fc.weight", 1))
    classes.update(zip(gated, (first, second, third), strict=True))
    shapes = {
        "conv1": (widths[0], 3),
        "conv2": (widths[1], widths[0]),
        "conv3": (widths[2], widths[1]),
        "fc": (5, widths[2]),
    }
    sizes = {Side(f"{name}.weight", dim): shape[dim] for name, shape in shapes.items() for dim in (0, 1)}
    kernels = tuple(Kernel(name, f"{name}.weight", 1.0 if name == "fc" else 9.0 * pixels, 1) for name in shapes)
    size = widths[0] + widths[1] + (0 if residual else widths[2])
    return ChannelMap(size, classes, sizes, kernels, gated, ())


def flops_target(channel_map: ChannelMap, share: float) -> Targets:
    """A share of the FLOPs as the only target."""
    return Targets([Target(Flops(channel_map), share)])


def bank_of(
    net: nn.Module, channel_map: ChannelMap, flops: float = 0.5, method: Method | None = None, **options: int
) -> GateBank:  # fmt: skip
    """A bank for a net, towards a share of its FLOPs."""
    targets = flops_target(channel_map, flops)
    return GateBank(net, channel_map, Learner.of(channel_map, targets, method or GDP(), **options))


def gated_net(
    flops: float = 0.5, steps: int = 100, seed: int = 0, residual: bool = False, round_to: int = 1, **settings: float
) -> tuple[ConvNet, GateBank]:
    """A ConvNet with its bank."""
    torch.manual_seed(seed)
    net = ConvNet(residual=residual)
    channel_map = conv_net_map(residual=residual)
    method = GDP(**settings)  # type: ignore[arg-type]
    net.autogate = bank_of(net, channel_map, flops, method, steps=steps, round_to=round_to)
    return net, net.autogate


def batch(seed: int, size: int = 8) -> tuple[Tensor, Tensor]:
    """Images and classes that a linear map of the image decides."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(size, 3, 6, 6, generator=generator)
    teacher = torch.randn(3 * 36, 5, generator=torch.Generator().manual_seed(99))
    return images, (images.flatten(1) @ teacher).argmax(1)


def backward(net: nn.Module, seed: int = 0, scale: float = 1.0) -> None:
    """Fresh gradients of one batch's loss."""
    images, labels = batch(seed)
    net.zero_grad()
    (scale * nn.functional.cross_entropy(net(images), labels)).backward()


def train(net: nn.Module, optimizer: torch.optim.Optimizer, steps: int, first: int = 0) -> list[float]:
    """A plain training loop, which knows nothing of gates."""
    losses = []
    for step in range(first, first + steps):
        images, labels = batch(step)
        loss = nn.functional.cross_entropy(net(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def kernels_of(net: ConvNet) -> list[torch.Tensor]:
    return [net.conv2.weight, net.conv3.weight, net.fc.weight]


def sides_of(bank: GateBank, values: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """A value per class, as it lies along the gated sides."""
    return tuple(values[bank.channel_map.classes[side]] for side in bank.channel_map.gated)


def random_alpha(bank: GateBank, least: float = 0.1) -> torch.Tensor:
    return least + (1.2 - least) * torch.rand(len(bank.alpha), generator=torch.Generator().manual_seed(3))
