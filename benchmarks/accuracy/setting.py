"""What is compared where: a network, its data, and what it is trained for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.accuracy.data import Data, augment, load, normalise


@dataclass(frozen=True)
class Recipe:
    """One schedule over the epochs, with a warm-up of one epoch (half if there is only one) and cosine decay; bfloat16
    if fast.

    Attributes:
        epochs: epochs of each method.
        dense_epochs: epochs of dense training before them; as many if None.
        peak: peak learning rate of dense training; half of it afterwards.
        batch: samples per batch; the last incomplete batch of an epoch is skipped.
        weight_decay: weight decay of all parameters.
        optimizer: SGD with Nesterov momentum, or AdamW.
        compiled: whether to use torch.compile.
    """

    epochs: int = 10
    dense_epochs: int | None = None
    peak: float = 0.1
    batch: int = 128
    weight_decay: float = 5e-4
    optimizer: Literal["sgd", "adamw"] = "sgd"
    compiled: bool = False

    @property
    def first_epochs(self) -> int:
        """Epochs of dense training before any method."""
        return self.epochs if self.dense_epochs is None else self.dense_epochs

    def steps(self, data: Data, epochs: int) -> int:
        """Optimizer steps in this many epochs."""
        return epochs * (len(data.labels) // self.batch)


def top1(outputs: Tensor) -> Tensor:
    """The most likely class, of each sample or of each pixel."""
    return outputs.argmax(1)


def accuracy(predicted: Tensor, labels: Tensor) -> float:
    """Accuracy in percent."""
    return float((predicted == labels).float().mean()) * 100


def flipped_and_shifted(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    return augment(images), labels


@dataclass(frozen=True)
class Sources:
    """Where data and trained weights lie. Which a setting needs, its module says."""

    data: Path
    weights: Path | None = None


@dataclass(frozen=True)
class Setting:
    """A network, its data and a score. The defaults are those of images with one label each.

    Attributes:
        network: makes the network, with trained weights if the setting has some.
        load: the split named "train" or "test".
        ready: what the network takes, of stored inputs.
        vary: augments a batch of stored inputs and labels.
        loss: mean loss of a batch, from the network's outputs and labels.
        answer: what is kept of the outputs to compare with the labels.
        score: of all answers and labels; larger is better.
        unit: what the score is called.
        heads: paths of the layers that make the outputs. Torch-Pruning has to be told.
        flops: shares of FLOPs that methods are compared at.
        recipe: how the network is trained.
        at_once: samples in a batch that is only looked at.
        convolutional: whether its convolutions can choose their channels for each image.
        from_scratch: whether slim networks are also trained from scratch, which says nothing if the weights of the
            dense one are from much more data.
        needs_weights: whether `Sources.weights` has to be given.
    """

    network: Callable[[Sources], nn.Module]
    load: Callable[[Sources, str], Data] = lambda sources, split: load(sources.data, split)
    ready: Callable[[Tensor], Tensor] = normalise
    vary: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] = flipped_and_shifted
    loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy
    answer: Callable[[Tensor], Tensor] = top1
    score: Callable[[Tensor, Tensor], float] = accuracy
    unit: str = "accuracy (%)"
    heads: tuple[str, ...] = ("fc",)
    flops: tuple[float, ...] = (0.5, 0.3)
    recipe: Recipe = field(default_factory=Recipe)
    at_once: int = 1000
    convolutional: bool = True
    from_scratch: bool = True
    needs_weights: bool = False
