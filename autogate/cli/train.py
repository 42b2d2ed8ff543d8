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

from autogate.cli.common import Debug, console, one_line_errors, one_line_warnings, timm_name, written_model
from autogate.cli.functions import model_function
from autogate.cli.method_options import asked_method, read_limits, with_method_options
from autogate.inspection import short
from autogate.methods import METHODS
from autogate.training import (
    SCHEDULES,
    Budget,
    Callback,
    Choice,
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
    Widths,
    is_slim_file,
    join_world,
    names_function,
    resume,
    start,
)

MOVABLE = ("data", "data_dir", "workers", "device", "log_interval", "epochs")
"""Options that can be given together with --resume."""

LOG_INTERVAL = 50
"""Steps between two lines where there is no terminal, and so no bar."""


def _option(panel: str, help: str, *names: str, **more: Any) -> Any:
    return typer.Option(*names, help=help, rich_help_panel=panel, **more)


_budget, _widths, _choice, _data, _learn, _run = (
    functools.partial(_option, panel)
    for panel in ("Budget", "Several widths", "A choice for each image", "Images", "Training", "Run")
)


_L, _I = Learning, Images  # the options have the defaults of these


@with_method_options
@one_line_errors
def train(
    context: typer.Context,
    model: Annotated[str | None, typer.Argument(help="A timm model, package.module:function, or a slim file.")] = None,
    data: Annotated[str | None, _data("Folder with train/ and validation/, or a name (see above).")] = None,
    flops: Annotated[float | None, _budget("Share of the FLOPs to keep, in (0, 1]; 0.5 if no share is given.")] = None,
    params: Annotated[float | None, _budget("Share of the parameters to keep.")] = None,
    activations: Annotated[float | None, _budget("Share of the bytes that layers output, to keep.")] = None,
    latency: Annotated[float | None, _budget("Share of the time for one image, on this machine.")] = None,
    round_to: Annotated[int, _budget("Make widths multiples of this.", min=1)] = 1,
    shortcuts: Annotated[str, _budget('"shared", or "conv": 1x1 convolutions on shortcuts.')] = "shared",
    ignore: Annotated[list[str] | None, _budget("Module whose channels all stay; can be repeated.")] = None,
    limit: Annotated[list[str] | None, _budget("NAME=LEAST[:MOST], shares of channels; can be repeated.")] = None,
    subnet_shares: Annotated[
        list[float] | None, _widths("Train several widths in one network: shares of the FLOPs.", "--subnets")
    ] = None,
    subnets_by: Annotated[str | None, _widths("Criterion for their channels. Default: a run with gates each.")] = None,
    subnets_rule: Annotated[str, _widths('"all" in each step, or "sandwich".')] = "all",
    nested: Annotated[bool, _widths("Keep slices as views of the weights.", "--nested")] = False,
    adaptive: Annotated[bool, _choice("Learn which channels to compute for each image.", "--adaptive")] = False,
    warmup: Annotated[float, _choice("Part of the steps in which only its modules train.")] = Choice.warmup,
    method: Annotated[str, _option("Method", f"What decides which channels die: {', '.join(METHODS)}.")] = "gdp",
    pretrained: Annotated[bool, _learn("Start from timm's weights.", "--pretrained")] = False,
    initial_checkpoint: Annotated[Path | None, _learn("Start from the weights in a file.", exists=True)] = None,
    num_classes: Annotated[int | None, _learn("Number of classes. Default: the data's.", min=1)] = None,
    drop: Annotated[float, _learn("Dropout rate.", min=0.0, max=1.0)] = 0.0,
    drop_path: Annotated[float, _learn("Stochastic depth rate.", min=0.0, max=1.0)] = 0.0,
    epochs: Annotated[int, _learn("Epochs in all, including the warm-up.", min=1)] = _L.epochs,
    opt: Annotated[str, _learn("Name of a timm optimizer.")] = _L.opt,
    lr: Annotated[float, _learn("Peak learning rate.", min=0.0)] = _L.lr,
    weight_decay: Annotated[float, _learn("Weight decay.", min=0.0)] = _L.weight_decay,
    momentum: Annotated[float, _learn("Momentum.")] = _L.momentum,
    sched: Annotated[str, _learn(f"Schedule: {', '.join(SCHEDULES)}.")] = _L.sched,
    warmup_epochs: Annotated[int, _learn("Epochs of warm-up.", min=0)] = _L.warmup_epochs,
    warmup_lr: Annotated[float, _learn("Learning rate at the start of the warm-up.", min=0.0)] = _L.warmup_lr,
    min_lr: Annotated[float, _learn("Learning rate at the end.", min=0.0)] = _L.min_lr,
    decay_epochs: Annotated[float, _learn("Epochs between decays (--sched step).", min=0.0)] = _L.decay_epochs,
    decay_rate: Annotated[float, _learn("Factor of a decay; power of --sched poly.", min=0.0)] = _L.decay_rate,
    clip_grad: Annotated[float | None, _learn("Clip the gradient's norm to this.", min=0.0)] = None,
    grad_accum_steps: Annotated[int, _learn("Batches per optimizer step.", min=1)] = _L.grad_accum_steps,
    smoothing: Annotated[float, _learn("Label smoothing.", min=0.0, max=1.0)] = _L.smoothing,
    amp: Annotated[bool, _learn("Train in mixed precision.", "--amp")] = False,
    amp_dtype: Annotated[str, _learn("bfloat16, or float16 with a gradient scaler.")] = _L.amp_dtype,
    model_ema: Annotated[bool, _learn("Average the weights and save the average.", "--model-ema")] = False,
    model_ema_decay: Annotated[float, _learn("Decay of the average.", min=0, max=1)] = _L.model_ema_decay,
    distill: Annotated[bool, _learn("Distill from the dense model's outputs.", "--distill")] = False,
    distill_weight: Annotated[float, _learn("Its weight in the loss, in (0, 1].")] = Distillation.weight,
    distill_temperature: Annotated[float, _learn("Divides both models' outputs.")] = Distillation.temperature,
    data_dir: Annotated[str | None, _data("Folder of a named data set.")] = None,
    data_download: Annotated[bool, _data("Download it into --data-dir.", "--data-download")] = False,
    train_split: Annotated[str, _data("Name of the part to train on.")] = _I.train_split,
    val_split: Annotated[str, _data("Name of the part to evaluate on.")] = _I.val_split,
    img_size: Annotated[int | None, _data("Side of the images in pixels. Default: the model's.", min=1)] = None,
    batch_size: Annotated[int, _data("Images per batch and process.", "--batch-size", "-b", min=1)] = _I.batch_size,
    validation_batch_size: Annotated[int | None, _data("For evaluation. Default: --batch-size.", min=1)] = None,
    workers: Annotated[int, _data("Processes that load images.", "--workers", "-j", min=0)] = _I.workers,
    scale: Annotated[tuple[float, float], _data("Range of the area of random crops.")] = _I.scale,
    hflip: Annotated[float, _data("Probability of a horizontal flip.", min=0.0, max=1.0)] = _I.hflip,
    color_jitter: Annotated[float, _data("Strength of color jitter.", min=0.0)] = _I.color_jitter,
    aa: Annotated[str | None, _data("AutoAugment or RandAugment policy, e.g. rand-m9-mstd0.5.")] = None,
    mixup: Annotated[float, _data("Alpha of mixup; 0 turns it off.", min=0.0)] = _I.mixup,
    cutmix: Annotated[float, _data("Alpha of cutmix; 0 turns it off.", min=0.0)] = _I.cutmix,
    out: Annotated[Path | None, _run("Folder of the run. Default: runs/MODEL.")] = None,
    resume_run: Annotated[Path | None, _run("Folder of a run to resume.", "--resume")] = None,
    seed: Annotated[int, _run("Random seed.", min=0)] = 42,
    device: Annotated[str | None, _run("cpu or cuda. Default: a GPU if there is one.")] = None,
    log_interval: Annotated[int | None, _run("Steps between lines, 10 or more; 50 without a terminal.", min=10)] = None,
    tensorboard: Annotated[bool, _run("Log for TensorBoard too.", "--tensorboard")] = False,
    debug: Debug = False,
    **settings: Any,
) -> None:  # fmt: skip
    """Fine-tune a timm model with gates and make it slim. Start from a trained model.

    --data is a folder with train/ and validation/, each with one folder per class; or cifar10 or cifar100; or a name
    that timm.data.create_dataset accepts (torch/..., tfds/..., hfds/..., wds/...).

    Ctrl-C stops the run and leaves a checkpoint; --resume continues from it. With more --epochs than planned the run
    goes on longer, a finished one too: the learning rate follows the schedule of the longer run. For distributed
    training use torchrun: torchrun --nproc-per-node 2 -m autogate.cli train ...

    With --subnets 0.05 0.22 0.45 the run makes one network of several widths: it finds the channels of each, then
    trains all together, for --epochs each time. --distill is then in place.

    With --adaptive the model learns which channels to compute for each image; --flops is the mean over images.

    Example: autogate train resnet50 --pretrained --data imagenet/ --flops 0.5 --epochs 30 --amp
    """
    asked = context.params
    if resume_run is None:
        recipe, folder = _recipe(asked), out or Path("runs") / _folder_of(str(model))
    else:
        recipe, folder = _resumed(resume_run, context), resume_run
    function, stopped = model_function(model), _Signals()
    with join_world(recipe.device) as world, stopped:
        callbacks: list[Callback] = []
        if world.main:
            callbacks.append(_Bar(console, log_interval))
            if recipe.tensorboard:
                callbacks.append(TensorBoard(folder / "tensorboard"))
        with one_line_warnings():
            if resume_run is None:
                result = start(recipe, folder, world, callbacks, stopped, function)
            else:
                result = resume(folder, world, callbacks, stopped, lambda _: recipe, function)
        if world.main:
            _print_result(result, folder, world.size)
    if result is None:
        raise typer.Exit(128 + (stopped.number or signal.SIGTERM))


def _folder_of(model: str) -> str:
    """Name of the run's folder."""
    return f"{Path(model).stem}-again" if is_slim_file(model) else model.replace("/", "_").replace(":", ".")


def _recipe(asked: dict[str, Any]) -> Recipe:
    """The recipe that the options ask for."""
    if asked["model"] is None:
        raise typer.BadParameter("name a timm model, or resume a run with --resume.", param_hint="MODEL")
    if asked["data"] is None:
        raise typer.BadParameter("name a folder of images, or a data set.", param_hint="--data")
    network = _filled(
        Network, asked, name=_model_name(asked["model"]), initial_checkpoint=_text(asked["initial_checkpoint"])
    )
    images = _filled(Images, asked, download=asked["data_download"], scale=tuple(asked["scale"]))
    limits = read_limits(asked["limit"] or [])
    budget = _filled(Budget, asked, ignore=tuple(asked["ignore"] or ()), limits=limits)
    teacher = Distillation(asked["distill_weight"], asked["distill_temperature"]) if asked["distill"] else None
    shares = tuple(sorted({share for share in asked["subnet_shares"] or () if share != 1}))
    widths = Widths(shares, asked["subnets_by"], asked["subnets_rule"], asked["nested"]) if shares else None
    if widths is None and (asked["subnets_by"] or asked["nested"] or asked["subnets_rule"] != "all"):
        raise typer.BadParameter("it is for several widths; name their shares.", param_hint="--subnets")
    if asked["warmup"] != Choice.warmup and not asked["adaptive"]:
        raise typer.BadParameter("it is for a choice of channels for each image.", param_hint="--adaptive")
    choice = Choice(asked["warmup"]) if asked["adaptive"] else None
    parts = {"network": network, "images": images, "budget": budget, "learning": _filled(Learning, asked)}
    return _filled(
        Recipe, asked, **parts, distillation=teacher, method=asked_method(asked), subnets=widths, adaptive=choice
    )


def _model_name(name: str) -> str:
    if is_slim_file(name):
        return str(written_model(Path(name)).resolve())
    return name if names_function(name) else timm_name(name)


def _filled(kind: Any, asked: dict[str, Any], **known: Any) -> Any:
    """Fill a dataclass from the options with the names of its fields; `known` overrides them."""
    names = {field.name for field in dataclasses.fields(kind)}
    return kind(**{**{name: asked[name] for name in names & set(asked)}, **known})


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)


def _resumed(run: Path, context: typer.Context) -> Recipe:
    """The recipe of a run to resume, with the options that may change."""
    given = {
        name: value
        for name, value in context.params.items()
        if getattr(context.get_parameter_source(name), "name", "") == "COMMANDLINE"
    }
    recipe = RunFolder(run).info().recipe
    if given.get("model") == recipe.network.name and names_function(recipe.network.name):
        del given["model"]  # imported because it is named here, not because the run's folder names it
    fixed = sorted(set(given) - {"resume_run", "debug", *MOVABLE})
    if fixed:
        raise typer.BadParameter(
            f"a resumed run keeps its options; omit {', '.join(name.replace('_', '-') for name in fixed)}.",
            param_hint="--resume",
        )
    images = dataclasses.replace(
        recipe.images, **{name: given[name] for name in ("data", "data_dir", "workers") if name in given}
    )
    learning = dataclasses.replace(recipe.learning, epochs=given.get("epochs", recipe.learning.epochs))
    return dataclasses.replace(recipe, images=images, learning=learning, device=given.get("device", recipe.device))


train.several = ("--subnets",)  # type: ignore[attr-defined]


class _Signals:
    """Whether Ctrl-C or SIGTERM has asked the run to stop. A second Ctrl-C ends the run at once."""

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
        # torchrun forwards Ctrl-C to processes that may already have received it from the terminal.
        if self.number == signal.SIGINT == number and "TORCHELASTIC_RUN_ID" not in os.environ:
            raise KeyboardInterrupt
        self.number = number


class _Bar(Callback):
    """A progress bar, and a line for each epoch; lines within an epoch if asked for, or if there is no terminal."""

    def __init__(self, console: Console, interval: int | None = None):
        self.interval = interval or (None if console.is_terminal else LOG_INTERVAL)
        self.told = 0
        columns = TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%")
        self.progress = Progress(*columns, TimeRemainingColumn(), console=console)
        self.task: TaskID | None = None

    def started(self, info: RunInfo, step: int) -> None:
        self.info = info
        self.progress.console.print(
            f"{info.recipe.network.name}: {short(info.flops)} FLOPs, {short(info.params)} parameters, "
            f"{_subject(info)}; {info.train_images} training and {info.val_images} validation images of "
            f"{info.num_classes} classes at {info.input_size[-1]} pixels; {info.steps} steps",
            highlight=False,
            soft_wrap=True,
        )
        self.progress.start()
        self.told = step
        self.task = self.progress.add_task("evaluating", total=info.steps, completed=step)

    def stepped(self, metrics: StepMetrics) -> None:
        if self.task is not None:
            words = f"epoch {metrics.epoch}/{self.info.recipe.learning.epochs}, loss {metrics.loss:.3f}"
            if self.info.recipe.subnets is None:
                words += f", FLOPs {metrics.flops:.1%}"
            if self.info.gates:
                words += f", gates {metrics.live}/{self.info.gates}"
            self.progress.update(self.task, completed=metrics.step, description=words)
            if self.interval is not None and metrics.step >= self.told + self.interval:
                self.told = metrics.step
                line = f"step {metrics.step}/{self.info.steps}, {words}, lr {metrics.lr:.2g}"
                self.progress.console.print(line, highlight=False, soft_wrap=True)

    def evaluated(self, row: EpochRow) -> None:
        loss = "" if row.train_loss is None else f"loss {row.train_loss:.3f}, "
        average = "" if row.ema_accuracy is None else f" (averaged {row.ema_accuracy:.2f} %)"
        left = "" if self.info.recipe.subnets is not None else f", FLOPs {row.flops:.1%}"
        if self.info.gates:
            left += f", parameters {row.params:.1%}, gates {row.live}/{row.gates}"
        self.progress.console.print(
            f"{f'epoch {row.epoch}' if row.epoch else 'dense model'}: {loss}accuracy {row.accuracy:.2f} %{average}"
            f"{left}",
            highlight=False,
            soft_wrap=True,
        )
        if self.task is not None:
            self.progress.update(self.task, completed=row.step)

    def finished(self) -> None:
        self.progress.stop()


def _print_result(result: Result | None, folder: Path, processes: int) -> None:
    if result is None:
        name = RunFolder(folder).info().recipe.network.name
        command = ["autogate", "train", *([name] if names_function(name) else []), "--resume", str(folder)]
        if processes > 1:
            command = ["torchrun", "--nproc-per-node", str(processes), "-m", "autogate.cli", *command[1:]]
        console.print(f"stopped; resume with: {shlex.join(command)}", soft_wrap=True, highlight=False, markup=False)
        return
    if RunFolder(folder).info().recipe.subnets is not None:
        _print_subnets(RunFolder(folder))
        return
    is_slim = RunFolder(folder).info().recipe.adaptive is None
    kind = "slim" if is_slim else "adaptive"
    table = Table("", "dense", kind, f"{kind} / dense")
    for column in table.columns[1:]:
        column.justify = "right"
    dense = RunFolder(folder).metrics()[0].accuracy
    slim = "-" if result.accuracy is None else f"{result.accuracy:.2f}"
    name = "FLOPs" if is_slim else "FLOPs of an image, on average"
    table.add_row(name, short(result.dense_flops), short(result.flops), f"{result.flops / result.dense_flops:.3f}")
    table.add_row(
        "parameters", short(result.dense_params), short(result.params), f"{result.params / result.dense_params:.3f}"
    )
    table.add_row("accuracy (%), before and after", f"{dense:.2f}", slim, "")
    console.print(table)
    made = RunFolder(folder).made_file(RunFolder(folder).info().recipe)
    console.print(f"{kind} model: {made.resolve()}", soft_wrap=True, highlight=False)
    console.print(f"report: autogate report {shlex.quote(str(folder))}", soft_wrap=True, highlight=False, markup=False)


def _subject(info: RunInfo) -> str:
    """What is trained, in a few words."""
    widths = info.recipe.subnets
    if info.recipe.adaptive is not None:
        return f"a choice for each image, {info.targets['FLOPs']:.1%} of the FLOPs on average"
    return f"{info.gates} gates" if widths is None else f"{len(widths.shares) + 1} widths"


def _print_subnets(folder: RunFolder) -> None:
    table = Table("subnet", "FLOPs", "parameters", "accuracy (%)", "latency (ms)")
    for column in table.columns[1:]:
        column.justify = "right"
    for one in folder.subnet_sizes():
        numbers = (one.accuracy, "{:.2f}"), (None if one.seconds is None else 1e3 * one.seconds, "{:.2f}")
        shown = ("-" if number is None else text.format(number) for number, text in numbers)
        table.add_row(one.name, f"{one.flops:.1%}", f"{one.params:.1%}", *shown)
    console.print(table)
    console.print(f"switchable model: {folder.switchable_file.resolve()}", soft_wrap=True, highlight=False)
    report = f"report: autogate report {shlex.quote(str(folder.path))}"
    console.print(report, soft_wrap=True, highlight=False, markup=False)
