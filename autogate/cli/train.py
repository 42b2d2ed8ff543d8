"""`autogate train`: fine-tune a timm model with gates and make it slim."""

from __future__ import annotations

import dataclasses
import functools
import os
import shlex
import signal
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from autogate.cli.common import Debug, console, one_line_errors, one_line_warnings, timm_name
from autogate.inspection import short
from autogate.training import (
    SCHEDULES,
    Budget,
    Callback,
    Distillation,
    EpochRow,
    Images,
    Learning,
    Network,
    Recipe,
    Result,
    RunFolder,
    RunInfo,
    StepMetrics,
    TensorBoard,
    join_world,
    resume,
    start,
)

MOVABLE = ("data", "data_dir", "workers", "device")
"""Options that may be given together with --resume."""


def _option(panel: str, help: str, *names: str, **more: Any) -> Any:
    return typer.Option(*names, help=help, rich_help_panel=panel, **more)


_left, _data, _learn, _run = (
    functools.partial(_option, panel) for panel in ("What shall be left", "Images", "Learning", "The run")
)


_L, _I = Learning, Images  # whose defaults are the options'


@one_line_errors
def train(
    context: typer.Context,
    model: Annotated[str | None, typer.Argument(help="A name of timm's.")] = None,
    data: Annotated[str | None, _data("A folder with train/ and validation/, or a name: see below.")] = None,
    flops: Annotated[float | None, _left("Share of the FLOPs, in (0, 1]; 0.5 if no share is named.")] = None,
    params: Annotated[float | None, _left("Share of the parameters.")] = None,
    activations: Annotated[float | None, _left("Share of the bytes that layers give out.")] = None,
    latency: Annotated[float | None, _left("Share of the time a batch takes here.")] = None,
    round_to: Annotated[int, _left("Widths in multiples of this.", min=1)] = 1,
    shortcuts: Annotated[str, _left('"shared", or "conv": 1x1 convolutions on the shortcuts.')] = "shared",
    ignore: Annotated[list[str] | None, _left("A module whose channels all stay; can be repeated.")] = None,
    pretrained: Annotated[bool, _learn("Begin with timm's weights.", "--pretrained")] = False,
    initial_checkpoint: Annotated[Path | None, _learn("Begin with those in a file.", exists=True)] = None,
    num_classes: Annotated[int | None, _learn("Outputs; as many as the data has classes.", min=1)] = None,
    drop: Annotated[float, _learn("Dropout.", min=0.0, max=1.0)] = 0.0,
    drop_path: Annotated[float, _learn("Stochastic depth.", min=0.0, max=1.0)] = 0.0,
    epochs: Annotated[int, _learn("Passes over the images, warm-up included.", min=1)] = _L.epochs,
    opt: Annotated[str, _learn("An optimizer of timm's.")] = _L.opt,
    lr: Annotated[float, _learn("Peak learning rate.", min=0.0)] = _L.lr,
    weight_decay: Annotated[float, _learn("Weight decay.", min=0.0)] = _L.weight_decay,
    momentum: Annotated[float, _learn("Momentum.")] = _L.momentum,
    sched: Annotated[str, _learn(f"{', '.join(SCHEDULES)}.")] = _L.sched,
    warmup_epochs: Annotated[int, _learn("Epochs of warm-up.", min=0)] = _L.warmup_epochs,
    warmup_lr: Annotated[float, _learn("Where it begins.", min=0.0)] = _L.warmup_lr,
    min_lr: Annotated[float, _learn("Where the schedule ends.", min=0.0)] = _L.min_lr,
    decay_epochs: Annotated[float, _learn("Between the steps of --sched step.", min=0.0)] = _L.decay_epochs,
    decay_rate: Annotated[float, _learn("Of these steps; the power of --sched poly.", min=0.0)] = _L.decay_rate,
    clip_grad: Annotated[float | None, _learn("Largest norm of the gradient.", min=0.0)] = None,
    grad_accum_steps: Annotated[int, _learn("Batches a step.", min=1)] = _L.grad_accum_steps,
    smoothing: Annotated[float, _learn("Label smoothing.", min=0.0, max=1.0)] = _L.smoothing,
    amp: Annotated[bool, _learn("Mixed precision.", "--amp")] = False,
    amp_dtype: Annotated[str, _learn("bfloat16, float16 (with a gradient scaler).")] = _L.amp_dtype,
    model_ema: Annotated[bool, _learn("Finalize an average of the weights.", "--model-ema")] = False,
    model_ema_decay: Annotated[float, _learn("Its decay.", min=0, max=1)] = _L.model_ema_decay,
    distill: Annotated[bool, _learn("Train against the dense model's outputs.", "--distill")] = False,
    distill_weight: Annotated[float, _learn("Of these in the loss, in (0, 1].")] = Distillation.weight,
    distill_temperature: Annotated[float, _learn("Of both outputs.")] = Distillation.temperature,
    data_dir: Annotated[str | None, _data("Where a named data set lies.")] = None,
    data_download: Annotated[bool, _data("Fetch it there.", "--data-download")] = False,
    train_split: Annotated[str, _data("Name of the part to train on.")] = _I.train_split,
    val_split: Annotated[str, _data("Name of the part to evaluate on.")] = _I.val_split,
    img_size: Annotated[int | None, _data("Side of the images; the model's own.", min=1)] = None,
    batch_size: Annotated[int, _data("Images a batch, in each process.", "--batch-size", "-b", min=1)] = _I.batch_size,
    validation_batch_size: Annotated[int | None, _data("For evaluation; the same.", min=1)] = None,
    workers: Annotated[int, _data("Processes that load images.", "--workers", "-j", min=0)] = _I.workers,
    scale: Annotated[tuple[float, float], _data("Part of the area that crops take.")] = _I.scale,
    hflip: Annotated[float, _data("Probability of a horizontal flip.", min=0.0, max=1.0)] = _I.hflip,
    color_jitter: Annotated[float, _data("Color jitter.", min=0.0)] = _I.color_jitter,
    aa: Annotated[str | None, _data("AutoAugment or RandAugment, as in timm: rand-m9-mstd0.5.")] = None,
    mixup: Annotated[float, _data("Alpha of mixup; 0 is off.", min=0.0)] = _I.mixup,
    cutmix: Annotated[float, _data("Alpha of cutmix; 0 is off.", min=0.0)] = _I.cutmix,
    out: Annotated[Path | None, _run("The run's folder. runs/MODEL.")] = None,
    resume_run: Annotated[Path | None, _run("Go on with the run in this folder.", "--resume")] = None,
    seed: Annotated[int, _run("For all that is random.", min=0)] = 42,
    device: Annotated[str | None, _run("cpu, cuda; a GPU where there is one.")] = None,
    tensorboard: Annotated[bool, _run("Log for TensorBoard too.", "--tensorboard")] = False,
    debug: Debug = False,
) -> None:  # fmt: skip
    """Fine-tune a timm model with gates and make it slim.

    The data is a folder with one folder a class under train/ and validation/, cifar10, cifar100, or a name that
    timm.data.create_dataset knows (torch/..., tfds/..., hfds/..., wds/...). Start from a trained model.

    Ctrl-C leaves a checkpoint, --resume goes on from it. Under torchrun training is distributed:
    torchrun --nproc-per-node 2 -m autogate.cli train ...

    Example: autogate train resnet50 --pretrained --data imagenet/ --flops 0.5 --epochs 30 --amp
    """
    asked = context.params
    if resume_run is None:
        recipe, folder = _recipe(asked), out or Path("runs") / str(model).replace("/", "_")
    else:
        recipe, folder = _resumed(resume_run, context), resume_run
    stopped = _Signals()
    with join_world(recipe.device) as world, stopped:
        callbacks: list[Callback] = []
        if world.main:
            callbacks.append(_Bar(console))
            if recipe.tensorboard:
                callbacks.append(TensorBoard(folder / "tensorboard"))
        with one_line_warnings():
            if resume_run is None:
                result = start(recipe, folder, world, callbacks, stopped)
            else:
                result = resume(folder, world, callbacks, stopped, lambda _: recipe)
        if world.main:
            _tell(result, folder, world.size)
    if result is None:
        raise typer.Exit(128 + (stopped.number or signal.SIGTERM))


def _recipe(asked: dict[str, Any]) -> Recipe:
    """What the options ask for."""
    if asked["model"] is None:
        raise typer.BadParameter("name a model of timm's, or a run with --resume.", param_hint="MODEL")
    if asked["data"] is None:
        raise typer.BadParameter("name a folder of images or a data set.", param_hint="--data")
    network = _filled(
        Network, asked, name=timm_name(asked["model"]), initial_checkpoint=_text(asked["initial_checkpoint"])
    )
    images = _filled(Images, asked, download=asked["data_download"], scale=tuple(asked["scale"]))
    budget = _filled(Budget, asked, ignore=tuple(asked["ignore"] or ()))
    teacher = Distillation(asked["distill_weight"], asked["distill_temperature"]) if asked["distill"] else None
    parts = {"network": network, "images": images, "budget": budget, "learning": _filled(Learning, asked)}
    return _filled(Recipe, asked, **parts, distillation=teacher)


def _filled(kind: Any, asked: dict[str, Any], **known: Any) -> Any:
    """A dataclass whose fields are options of the same name, but for those that are known."""
    names = {field.name for field in dataclasses.fields(kind)}
    return kind(**{**{name: asked[name] for name in names & set(asked)}, **known})


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)


def _resumed(run: Path, context: typer.Context) -> Recipe:
    """The recipe of a run, with what may change about it."""
    given = {
        name: value
        for name, value in context.params.items()
        if getattr(context.get_parameter_source(name), "name", "") == "COMMANDLINE"
    }
    fixed = sorted(set(given) - {"resume_run", "debug", *MOVABLE})
    if fixed:
        raise typer.BadParameter(
            f"a run goes on as it began; leave out {', '.join(name.replace('_', '-') for name in fixed)}.",
            param_hint="--resume",
        )
    recipe = RunFolder(run).info().recipe
    images = dataclasses.replace(
        recipe.images, **{name: given[name] for name in ("data", "data_dir", "workers") if name in given}
    )
    return dataclasses.replace(recipe, images=images, device=given.get("device", recipe.device))


class _Signals:
    """Ctrl-C and SIGTERM ask a run to stop; called, it tells whether one did. A second Ctrl-C ends it at once."""

    def __init__(self) -> None:
        self.number: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> _Signals:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def __call__(self) -> bool:
        return self.number is not None

    def _note(self, number: int, frame: FrameType | None) -> None:
        # torchrun hands a Ctrl-C on to processes that may have had it from the terminal already.
        if self.number == signal.SIGINT == number and "TORCHELASTIC_RUN_ID" not in os.environ:
            raise KeyboardInterrupt
        self.number = number


class _Bar(Callback):
    """A progress bar, and a line for each epoch."""

    def __init__(self, console: Console):
        columns = TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%")
        self.progress = Progress(*columns, TimeRemainingColumn(), console=console)
        self.task: TaskID | None = None

    def started(self, info: RunInfo, step: int) -> None:
        self.info = info
        self.progress.console.print(
            f"{info.recipe.network.name}: {short(info.flops)} FLOPs, {short(info.params)} parameters, {info.gates} "
            f"gates; {info.train_images} training and {info.val_images} validation images of {info.num_classes} "
            f"classes at {info.input_size[-1]} pixels; {info.steps} steps",
            highlight=False,
            soft_wrap=True,
        )
        self.progress.start()
        self.task = self.progress.add_task("evaluating", total=info.steps, completed=step)

    def stepped(self, metrics: StepMetrics) -> None:
        if self.task is not None:
            words = (
                f"epoch {metrics.epoch}/{self.info.recipe.learning.epochs}, loss {metrics.loss:.3f}, FLOPs "
                f"{metrics.flops:.1%}, gates {metrics.live}/{self.info.gates}"
            )
            self.progress.update(self.task, completed=metrics.step, description=words)

    def evaluated(self, row: EpochRow) -> None:
        loss = "" if row.train_loss is None else f"loss {row.train_loss:.3f}, "
        average = "" if row.ema_accuracy is None else f" (averaged {row.ema_accuracy:.2f} %)"
        self.progress.console.print(
            f"{f'epoch {row.epoch}' if row.epoch else 'dense model'}: {loss}accuracy {row.accuracy:.2f} %{average}, "
            f"FLOPs {row.flops:.1%}, parameters {row.params:.1%}, gates {row.live}/{row.gates}",
            highlight=False,
            soft_wrap=True,
        )
        if self.task is not None:
            self.progress.update(self.task, completed=row.step)

    def finished(self) -> None:
        self.progress.stop()


def _tell(result: Result | None, folder: Path, processes: int) -> None:
    if result is None:
        command = ["autogate", "train", "--resume", str(folder)]
        if processes > 1:
            command = ["torchrun", "--nproc-per-node", str(processes), "-m", "autogate.cli", *command[1:]]
        console.print(f"stopped; go on with: {shlex.join(command)}", soft_wrap=True, highlight=False, markup=False)
        return
    table = Table("", "dense", "slim", "slim / dense")
    for column in table.columns[1:]:
        column.justify = "right"
    dense = RunFolder(folder).metrics()[0].accuracy
    slim = "-" if result.accuracy is None else f"{result.accuracy:.2f}"
    table.add_row("FLOPs", short(result.dense_flops), short(result.flops), f"{result.flops / result.dense_flops:.3f}")
    table.add_row(
        "parameters", short(result.dense_params), short(result.params), f"{result.params / result.dense_params:.3f}"
    )
    table.add_row("accuracy (%), before and after", f"{dense:.2f}", slim, "")
    console.print(table)
    console.print(f"slim model: {RunFolder(folder).slim_file.resolve()}", soft_wrap=True, highlight=False)
    console.print(f"report: autogate report {shlex.quote(str(folder))}", soft_wrap=True, highlight=False, markup=False)
