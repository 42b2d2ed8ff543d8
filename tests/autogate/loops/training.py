"""Short training runs of small gated networks, and whether finalize is exact after them."""

import timm
import torch
from timm.optim import create_optimizer_v2
from torch import nn

import autogate
from tests.autogate.loops.small_nets import EXAMPLE, Residual, batches


def net(**options) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    example = torch.randn(2, 3, 32, 32)
    model = timm.create_model("test_resnet", num_classes=4)
    return autogate.prepare(model, example, **options), example


def loss_of(model: nn.Module, seed: int, size: int = 8) -> torch.Tensor:
    images = torch.randn(size, 3, 32, 32, generator=torch.Generator().manual_seed(seed))
    return nn.functional.cross_entropy(model(images), (images.mean((1, 2, 3)) > 0).long())


@torch.no_grad()
def output(model: nn.Module, example: torch.Tensor) -> torch.Tensor:
    return model.eval()(example)


def assert_exact(model: nn.Module, example: torch.Tensor) -> None:
    gated = output(model, example)
    torch.testing.assert_close(output(autogate.finalize(model, warn=False), example), gated, rtol=1e-5, atol=1e-5)


def train(model: nn.Module, steps: int, after=lambda: None, lr: float = 0.05) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    for step in range(steps):
        model.train()
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()
        after()


OPTIMIZERS = {
    "sgd": 0.05, "momentum": 0.05, "nesterov": 0.05, "adam": 1e-3, "adamw": 1e-3, "rmsprop": 1e-3, "lamb": 5e-3,
    "lion": 1e-4, "adan": 1e-3,
}  # fmt: skip
"""Names of timm's optimizers, with a learning rate each."""


def optimizer_of(model: nn.Module, name: str, **way: bool) -> torch.optim.Optimizer:
    """As timm makes it, with two parameter groups; its "sgd" is Nesterov's, ours the plain one."""
    kind = {"opt": "momentum", "momentum": 0.0} if name == "sgd" else {"opt": name}
    return create_optimizer_v2(model, **kind, lr=OPTIMIZERS[name], weight_decay=1e-4, **way)


def trained_by(name: str, steps: int = 40, flops: float = 0.5, hooks: bool = True, **way: bool) -> nn.Module:
    """A small network after some steps of an optimizer; without hooks, its loop steps the gates."""
    torch.manual_seed(0)
    model = autogate.prepare(Residual(), EXAMPLE, flops=flops, steps=40, hooks=hooks)
    optimizer = optimizer_of(model, name, **way)
    for images, labels in batches(steps, size=8):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
        if not hooks:
            autogate.step(model, lr=optimizer.param_groups[0]["lr"])
    return model
