"""A complete example on real digits: train a small timm network, train it with gates, and remove the dead channels."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autogate import digits
from autogate.api import finalize, gated_summary, prepare
from autogate.budget import Shares

MODEL = "test_resnet"
"""A timm ResNet with 0.4 M parameters, small enough to train in minutes on two cores."""

BATCH = 64

Advance = Callable[[str], None]
"""Called after each optimizer step with a short text about the training."""


@dataclass(frozen=True)
class Measures:
    """A model in numbers: multiply-adds for one image, parameters, accuracy in percent, seconds for one image."""

    flops: float
    params: int
    accuracy: float
    latency: float


@dataclass(frozen=True)
class Outcome:
    """The outcome of the demo.

    Attributes:
        dense, slim: the network before and after.
        gated_accuracy: accuracy of the gated network, in percent, just before it was finalized.
        differing: number of test images on which the predictions of the gated and the slim network differ.
        error: largest relative difference between their outputs on the test images.
        model: the slim network.
    """

    dense: Measures
    slim: Measures
    gated_accuracy: float
    differing: int
    error: float
    model: nn.Module


def steps_in(epochs: int, split: digits.Split) -> int:
    """Number of optimizer steps that `fit` takes."""
    return epochs * (len(split.labels) // BATCH)


def fit(model: nn.Module, split: digits.Split, epochs: int, peak: float, advance: Advance = lambda _: None) -> None:
    """A plain training loop, which knows nothing of gates: SGD with momentum and a one-cycle schedule.

    Args:
        model: takes images (N, 1, H, W) and returns logits (N, 10).
        split: images to train on; they are shifted by up to two pixels at random.
        epochs: passes over the images, without the last incomplete batch.
        peak: highest learning rate.
        advance: called after each step.
    """
    optimizer = torch.optim.SGD(model.parameters(), lr=peak, momentum=0.9, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, peak, max(1, steps_in(epochs, split)), pct_start=0.2)
    model.train()
    for _ in range(epochs):
        for index in torch.randperm(len(split.labels)).split(BATCH):
            if len(index) < BATCH:
                continue
            shift = torch.randint(-2, 3, (2,)).tolist()
            logits = model(split.images[index].roll(shift, dims=(2, 3)))
            loss = F.cross_entropy(logits, split.labels[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            advance(f"loss {loss.item():.3f}")


@torch.no_grad()
def logits(model: nn.Module, images: Tensor) -> Tensor:
    """Logits (N, 10) in eval mode."""
    model.eval()
    return torch.cat([model(part) for part in images.split(256)])


def accuracy(output: Tensor, labels: Tensor) -> float:
    """Percentage of logits (N, 10) that are highest at the label."""
    return 100 * float((output.argmax(1) == labels).float().mean())


@torch.no_grad()
def latencies(models: Iterable[nn.Module], image: Tensor, rounds: int = 60) -> list[float]:
    """Median seconds of one forward of each model. The models take turns, so that a drifting machine is fair to all."""
    models = list(models)
    times: list[list[float]] = [[] for _ in models]
    for model in models:
        model.eval()
        model(image)
    for _ in range(rounds):
        for model, taken in zip(models, times, strict=True):
            start = time.perf_counter()
            model(image)
            taken.append(time.perf_counter() - start)
    return [statistics.median(taken) for taken in times]


def run(
    flops: float = 0.5, dense_epochs: int = 6, gated_epochs: int = 14, seed: int = 0, advance: Advance = lambda _: None
) -> Outcome:
    """Train dense, train with gates, finalize and compare.

    Args:
        flops: share of the FLOPs to keep.
        dense_epochs, gated_epochs: passes over the 1,347 training images.
        seed: seed of the weights, the shuffling and the split.
        advance: called after each optimizer step.
    """
    Shares(flops=flops)  # raises for a wrong share before anything is trained
    torch.manual_seed(seed)
    train, test = digits.load(seed)
    model = timm.create_model(MODEL, num_classes=10, in_chans=1)
    fit(model, train, dense_epochs, 0.05, advance)
    dense = copy.deepcopy(model)

    model = prepare(model, train.images[:2], flops=flops, steps=steps_in(gated_epochs, train))
    fit(model, train, gated_epochs, 0.05, advance)
    state = gated_summary(model)
    gated = logits(model, test.images)
    slim = finalize(model)

    output = logits(slim, test.images)
    dense_latency, slim_latency = latencies([dense, slim], test.images[:1])
    dense_accuracy = accuracy(logits(dense, test.images), test.labels)
    return Outcome(
        dense=Measures(state.all_flops, _params(dense), dense_accuracy, dense_latency),
        slim=Measures(state.flops, _params(slim), accuracy(output, test.labels), slim_latency),
        gated_accuracy=accuracy(gated, test.labels),
        differing=int((gated.argmax(1) != output.argmax(1)).sum()),
        error=float((gated - output).abs().max() / gated.abs().max()),
        model=slim,
    )


def total_steps(dense_epochs: int = 6, gated_epochs: int = 14) -> int:
    """Number of optimizer steps that `run` takes."""
    train, _ = digits.load()
    return steps_in(dense_epochs + gated_epochs, train)


def _params(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
