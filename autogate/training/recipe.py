"""The recipe of a training run: what to do, as frozen values. Names and meanings are those of timm's train.py."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from timm.optim import list_optimizers

from autogate.budget import Shares
from autogate.criteria import CRITERIA
from autogate.methods import method_of
from rewriters import AutogateError

SCHEDULES = ("cosine", "tanh", "poly", "step", "constant", "none")
"""The timm schedules that are driven by the number of steps."""

WORKERS = min(4, os.cpu_count() or 1)
"""Default number of processes that load images. torch warns if there are more than cores."""


@dataclass(frozen=True)
class Network:
    """The model to slim.

    Attributes:
        name: name of a timm model, with a tag if timm has several sets of pretrained weights; or the file of a slim
            model ("*.safetensors"), to slim it further; or "package.module:function", a function that is then
            passed beside the recipe.
        pretrained: whether to load timm's weights.
        initial_checkpoint: a file of weights to start from.
        num_classes: number of outputs; the number of classes in the data if None.
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
    """The data set, and how its images are loaded and augmented.

    Attributes:
        data: a folder with train/ and validation/ (or val/), each with one folder per class; or a name that
            `timm.data.create_dataset` accepts: "torch/cifar10", "tfds/...", "hfds/...", "wds/...".
        data_dir: folder of a named data set.
        download: whether to download it into that folder.
        train_split, val_split: names of the two parts.
        batch_size: images per batch, in each process.
        validation_batch_size: the same for evaluation; `batch_size` if None.
        workers: processes that load images, for each process that trains.
        scale: smallest and largest part of an image's area for random crops.
        hflip: probability of a horizontal flip.
        color_jitter: strength of the color jitter.
        aa: AutoAugment or RandAugment policy in timm's notation, such as "rand-m9-mstd0.5".
        mixup, cutmix: alpha of each; 0 turns it off.
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
    """The budget, with the names and meanings of `autogate.prepare`."""

    flops: float | None = None
    params: float | None = None
    activations: float | None = None
    latency: float | None = None
    round_to: int = 1
    shortcuts: str | tuple[str, ...] = "shared"
    ignore: tuple[str, ...] = ()
    limits: Mapping[str, float | tuple[float, float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        Shares(self.flops, self.params, self.activations, self.latency)  # raises if a share is outside of (0, 1]


@dataclass(frozen=True)
class Learning:
    """How the weights are trained.

    Attributes:
        epochs: passes over the training images, including the warm-up.
        opt: one of `timm.optim.list_optimizers()`.
        lr: peak learning rate.
        weight_decay, momentum: settings of the optimizer.
        sched: one of `SCHEDULES`.
        warmup_epochs, warmup_lr: length of a linear warm-up, and the learning rate that it starts from.
        min_lr: the learning rate that the schedule ends with.
        decay_epochs, decay_rate: for schedules that fall in steps ("poly" uses the rate as its power).
        clip_grad: largest norm of the gradient; None for no clipping.
        grad_accum_steps: batches per optimizer step.
        smoothing: label smoothing.
        amp: whether to use autocast in `amp_dtype`; float16 uses a gradient scaler.
        model_ema, model_ema_decay: whether to average the weights, and the decay. The average is what is finalized.
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
                f"{self.warmup_epochs} of {self.epochs} epochs are warm-up; it must be shorter than the run.",
                where="warmup_epochs",
            )


@dataclass(frozen=True)
class Distillation:
    """Training against the outputs of the dense model (Hinton et al., "Distilling the Knowledge in a Neural Network").

    Attributes:
        weight: weight of the teacher's part of the loss, in (0, 1]; the labels have the rest.
        temperature: divides the outputs of both models.
    """

    weight: float = 0.5
    temperature: float = 2.0

    def __post_init__(self) -> None:
        if not 0 < self.weight <= 1:
            raise AutogateError(f"the weight is {self.weight}; it must be in (0, 1].", where="distill_weight")
        if not self.temperature > 0:
            raise AutogateError(
                f"the temperature is {self.temperature}; it must be positive.", where="distill_temperature"
            )


@dataclass(frozen=True)
class Widths:
    """Several widths in one network (`autogate.subnets`), instead of one slim model.

    Attributes:
        shares: the share of the FLOPs of each subnet but the largest, in (0, 1), ascending.
        by: the criterion that finds their channels (`autogate.close`); None: a run with gates for each.
        rule: which of them a step trains: "all", or "sandwich" (`autogate.subnets.each`).
        nested: whether slices are views of the weights (`autogate.subnets.fuse`).
    """

    shares: tuple[float, ...]
    by: str | None = None
    rule: Literal["all", "sandwich"] = "all"
    nested: bool = False

    def __post_init__(self) -> None:
        if not self.shares or not all(0 < share < 1 for share in self.shares):
            raise AutogateError(
                "it takes one share or more, each in (0, 1); the whole model is there anyway.", where="subnets"
            )
        if list(self.shares) != sorted(set(self.shares)):
            raise AutogateError("the shares are not ascending.", where="subnets")
        if self.by is not None:
            _known("subnets_by", self.by, [name for name, one in CRITERIA.items() if one.needs == "weights"])
        _known("subnets_rule", self.rule, ("all", "sandwich"))


@dataclass(frozen=True)
class Choice:
    """A choice of channels for each image (`autogate.adaptive`), instead of a slim model.

    Attributes:
        warmup: the part of the steps in which the saliency modules train alone, in [0, 0.5].
    """

    warmup: float = 0.1

    def __post_init__(self) -> None:
        if not 0 <= self.warmup <= 0.5:
            raise AutogateError(f"warmup is {self.warmup}; it must be in [0, 0.5].", where="warmup")


@dataclass(frozen=True)
class Recipe:
    """Everything that a run depends on.

    Attributes:
        network, images, budget, learning: see the classes.
        distillation: None to train with the labels alone.
        method: what decides which channels die, as the call that makes it: "GDP(reach=0.2)".
        seed: seed of the weights, the order of images and all other random numbers.
        device: "cpu", "cuda"; a GPU if there is one, if None.
        tensorboard: whether to log for TensorBoard too.
        subnets: the widths of a switchable network; None for one slim model. `distillation` is then in place: narrower
            subnets learn from the largest one's answers.
        adaptive: how the model learns a choice of channels for each image; None if it doesn't.
    """

    network: Network
    images: Images
    budget: Budget = field(default_factory=Budget)
    learning: Learning = field(default_factory=Learning)
    distillation: Distillation | None = None
    method: str = "GDP()"
    seed: int = 42
    device: str | None = None
    tensorboard: bool = False
    subnets: Widths | None = None
    adaptive: Choice | None = None

    def __post_init__(self) -> None:
        method_of(self.method)
        if self.images.mixes and self.images.batch_size % 2:
            raise AutogateError("mixup and cutmix need an even batch size.", where="batch_size")


def _known(option: str, name: str, names: Iterable[str]) -> None:
    names = list(names)
    if name not in names:
        near = difflib.get_close_matches(name, names, n=3, cutoff=0.5) or names[:12]
        raise AutogateError(f"{name!r} is unknown.", where=option, remedy=f"Known names are {', '.join(near)}.")
