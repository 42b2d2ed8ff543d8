"""What a training run is asked to do, as plain values. Names and meanings are those of timm's train.py."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

from timm.optim import list_optimizers

from autogate.budget import Shares
from rewriters import AutogateError

SCHEDULES = ("cosine", "tanh", "poly", "step", "constant", "none")
"""Those of timm's schedules that go by the number of steps."""

WORKERS = min(4, os.cpu_count() or 1)
"""Processes that load images, if nobody says: torch warns of more than there are cores."""


@dataclass(frozen=True)
class Network:
    """The dense model, built by timm.

    Attributes:
        name: of the model, with a tag if there are several pretrained ones.
        pretrained: with the weights that timm has for it.
        initial_checkpoint: a file of weights to begin with.
        num_classes: outputs; as many as the data has classes if None.
        img_size: side of the images in pixels; the model's own if None.
        drop, drop_path: rates of dropout and of stochastic depth.
    """

    name: str
    pretrained: bool = False
    initial_checkpoint: str | None = None
    num_classes: int | None = None
    img_size: int | None = None
    drop: float = 0.0
    drop_path: float = 0.0


@dataclass(frozen=True)
class Images:
    """The data set and what is done to its images.

    Attributes:
        data: a folder with one folder a class under train/ and validation/ (or val/), or a name that
            `timm.data.create_dataset` knows: "torch/cifar10", "tfds/...", "hfds/...", "wds/...".
        data_dir: where the data of such a name lies.
        download: fetch it there.
        train_split, val_split: names of the two parts.
        batch_size: images a process and batch.
        validation_batch_size: for evaluation; the same if None.
        workers: processes that load images, for each process that trains.
        scale: least and largest part of an image's area that random crops take.
        hflip: probability of a horizontal flip.
        color_jitter: strength of it.
        aa: policy of AutoAugment or RandAugment in timm's notation, "rand-m9-mstd0.5" for instance.
        mixup, cutmix: alpha of each; 0 is off.
    """

    data: str
    data_dir: str | None = None
    download: bool = False
    train_split: str = "train"
    val_split: str = "validation"
    batch_size: int = 64
    validation_batch_size: int | None = None
    workers: int = WORKERS
    scale: tuple[float, float] = (0.08, 1.0)
    hflip: float = 0.5
    color_jitter: float = 0.4
    aa: str | None = None
    mixup: float = 0.0
    cutmix: float = 0.0

    @property
    def mixes(self) -> bool:
        return self.mixup > 0 or self.cutmix > 0


@dataclass(frozen=True)
class Budget:
    """What shall be left, as `autogate.prepare` takes it."""

    flops: float | None = None
    params: float | None = None
    activations: float | None = None
    latency: float | None = None
    round_to: int = 1
    shortcuts: str | tuple[str, ...] = "shared"
    ignore: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        Shares(self.flops, self.params, self.activations, self.latency)  # raises for a share that is none


@dataclass(frozen=True)
class Learning:
    """How the weights are trained.

    Attributes:
        epochs: passes over the training images, warm-up included.
        opt: one of `timm.optim.list_optimizers()`.
        lr: peak learning rate.
        weight_decay, momentum: of the optimizer.
        sched: one of `SCHEDULES`.
        warmup_epochs, warmup_lr: a linear warm-up, and where it begins.
        min_lr: where the schedule ends.
        decay_epochs, decay_rate: of the schedules that fall in steps ("poly" takes the rate as its power).
        clip_grad: largest norm of the gradient; None doesn't clip.
        grad_accum_steps: batches a step.
        smoothing: label smoothing.
        amp: autocast, in `amp_dtype`; float16 with a gradient scaler.
        model_ema, model_ema_decay: average the weights; the average is what is finalized.
    """

    epochs: int = 30
    opt: str = "sgd"
    lr: float = 0.02
    weight_decay: float = 1e-4
    momentum: float = 0.9
    sched: str = "cosine"
    warmup_epochs: int = 0
    warmup_lr: float = 1e-5
    min_lr: float = 0.0
    decay_epochs: float = 10.0
    decay_rate: float = 0.1
    clip_grad: float | None = None
    grad_accum_steps: int = 1
    smoothing: float = 0.0
    amp: bool = False
    amp_dtype: Literal["float16", "bfloat16"] = "bfloat16"
    model_ema: bool = False
    model_ema_decay: float = 0.9998

    def __post_init__(self) -> None:
        _known("opt", self.opt, map(str, list_optimizers()))
        _known("sched", self.sched, SCHEDULES)
        _known("amp_dtype", self.amp_dtype, ("bfloat16", "float16"))
        if not 0 <= self.warmup_epochs < self.epochs:
            raise AutogateError(
                f"{self.warmup_epochs} of {self.epochs} epochs can't be warm-up.", where="warmup_epochs"
            )


@dataclass(frozen=True)
class Distillation:
    """Training against the outputs of the dense model (Hinton et al., "Distilling the Knowledge in a Neural Network").

    Attributes:
        weight: of the teacher's part of the loss, in (0, 1]; the labels have the rest.
        temperature: both outputs are divided by it.
    """

    weight: float = 0.5
    temperature: float = 2.0

    def __post_init__(self) -> None:
        if not 0 < self.weight <= 1:
            raise AutogateError(f"{self.weight} is no weight; it must be in (0, 1].", where="distill_weight")
        if not self.temperature > 0:
            raise AutogateError(f"{self.temperature} is no temperature.", where="distill_temperature")


@dataclass(frozen=True)
class Recipe:
    """All that a run depends on.

    Attributes:
        network, images, budget, learning: see there.
        distillation: None trains with the labels alone.
        seed: for weights, the order of images and all that is random about them.
        device: "cpu", "cuda"; a GPU where there is one if None.
        tensorboard: log for TensorBoard too.
    """

    network: Network
    images: Images
    budget: Budget = field(default_factory=Budget)
    learning: Learning = field(default_factory=Learning)
    distillation: Distillation | None = None
    seed: int = 42
    device: str | None = None
    tensorboard: bool = False

    def __post_init__(self) -> None:
        if self.images.mixes and self.images.batch_size % 2:
            raise AutogateError("mixup and cutmix need an even batch size.", where="batch_size")


def _known(option: str, name: str, names: Iterable[str]) -> None:
    names = list(names)
    if name not in names:
        near = difflib.get_close_matches(name, names, n=3, cutoff=0.5) or names[:12]
        raise AutogateError(f"{name!r} is unknown.", where=option, remedy=f"There is {', '.join(near)}.")
