"""Write one self-contained HTML page about a run, and its figures as PNG files.

The page is made from the run's folder, and the dense model's channels, which are analysed again.
"""

from __future__ import annotations

import base64
import importlib.util
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from autogate.files import atomic_write, dense_model, load
from autogate.inspection import Comparison, Duration, compare, draw_coupling_graph, inspect_model, short
from autogate.training import (
    SHOWN,
    EpochRow,
    GateRow,
    ImageUse,
    ModelFunction,
    Result,
    RunFolder,
    RunInfo,
    SubnetRow,
    SubnetSize,
    build_network,
)
from rewriters import AutogateError, ChannelMap


@dataclass(frozen=True)
class Report:
    """The content of a page.

    Attributes:
        name: name of the run's folder.
        info, rows, gates, result: as in the run's folder.
        channel_map: the dense model's channels.
        latency: latency of the slim and the dense model; empty if it was not measured.
        threads: CPU threads during that measurement.
        sizes, subnets: of a run of several widths, as in its folder.
        use: what images use of a model that chooses its channels for each of them; None if that isn't known.
        examples: rows of images with their costs.
    """

    name: str
    info: RunInfo
    rows: tuple[EpochRow, ...]
    gates: tuple[GateRow, ...]
    result: Result | None
    channel_map: ChannelMap
    latency: tuple[Comparison, ...] = ()
    threads: int = 1
    sizes: tuple[SubnetSize, ...] = ()
    subnets: tuple[SubnetRow, ...] = ()
    use: ImageUse | None = None
    examples: tuple[Examples, ...] = ()


@dataclass(frozen=True)
class Examples:
    """Images side by side.

    Attributes:
        title: what they have in common.
        picture: a PNG file as a data URI.
        costs: of each, in words.
    """

    title: str
    picture: str
    costs: tuple[str, ...]


@dataclass(frozen=True)
class _Picture:
    """A figure of the page: name of its file, title, one line of text, and the drawing."""

    name: str
    title: str
    words: str
    svg: Markup


def read_report(
    run: Path, latency: bool = False, batches: Sequence[int] = (1, 64), function: ModelFunction | None = None
) -> Report:
    """Read a run's folder.

    Args:
        run: the folder. The run need not be finished.
        latency: whether to measure the latency of the slim and the dense model, in eager mode. This takes some seconds
            for each batch size.
        batches: batch sizes to measure.
        function: as for `autogate.training.start`.

    Raises:
        AutogateError: there is no run, its first evaluation is not done, or it has no slim model to measure.
    """
    folder = RunFolder(run)
    info, rows = folder.info(), folder.metrics()
    if not rows:
        raise AutogateError(
            "there is nothing to report yet: the evaluation of the dense model isn't done.", where=str(run)
        )
    network, budget = info.recipe.network, info.recipe.budget
    model = build_network(network, info.num_classes, weights=False, function=function)
    example = torch.randn(2, *info.input_size)
    found = inspect_model(model, example, ignore=budget.ignore, shortcuts=budget.shortcuts)
    timed: tuple[Comparison, ...] = ()
    if info.recipe.subnets is not None and not folder.subnets():
        raise AutogateError("there is nothing to report yet: no subnet was evaluated.", where=str(run))
    if latency and info.recipe.subnets is None and info.recipe.adaptive is None:
        if not folder.slim_file.is_file():
            raise AutogateError(
                "there is no slim model to measure yet.",
                where=str(run),
                remedy=f"Make one with autogate finalize {run}.",
            )
        models = dense_model(folder.slim_file), load(folder.slim_file)
        timed = tuple(compare(*models, batches=batches, compiled=(False,)))
    return Report(
        run.resolve().name, info, rows, folder.gates(), folder.result(), found.channel_map, timed,
        torch.get_num_threads(), folder.subnet_sizes(), folder.subnets(), folder.use(), _examples(folder),
    )  # fmt: skip


def write_report(report: Report, out: Path) -> Path:
    """Write the page, index.html, and a PNG file for each of its figures.

    Args:
        report: the content.
        out: a folder, which need not exist yet.

    Returns:
        Path of the page.

    Raises:
        AutogateError: matplotlib is not installed, or the files can't be written.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise AutogateError("a report needs matplotlib.", remedy="pip install 'autogate[report]'")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise AutogateError(f"the folder can't be made: {error}.", where=str(out)) from error
    environment = Environment(
        loader=PackageLoader("autogate.reporting", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    page = environment.get_template("page.html").render(
        report=report,
        pictures=_pictures(report, out),
        kind=_kind(report.info),
        numbers=[] if report.info.recipe.subnets is not None else _numbers(report),
        layers=_layers(report) if report.gates else [],
        subnets=[_subnet(size) for size in report.sizes],
        changes=_changes(report.result),
        latency=[_timing(row) for row in report.latency],
        options=_options(report.info),
        last=report.rows[-1],
    )
    with atomic_write(out / "index.html") as temporary:
        temporary.write_text(page, encoding="utf-8")
    return out / "index.html"


def _pictures(report: Report, out: Path) -> list[_Picture]:
    from autogate.reporting import plots

    with plots.styled():
        recipe = report.info.recipe
        of_kind = _of_subnets if recipe.subnets is not None else _of_gates if recipe.adaptive is None else _of_choice
        figures = of_kind(report)
    for name, _, _, figure in figures:
        plots.as_png(figure, out / f"{name}.png")
    with plots.styled(), tempfile.TemporaryDirectory() as folder:
        draw_coupling_graph(report.channel_map, out / "groups.png", plots.WIDTH)
        draw_coupling_graph(report.channel_map, Path(folder) / "groups.svg", plots.WIDTH)
        groups = Markup(plots.only_svg((Path(folder) / "groups.svg").read_text(encoding="utf-8")))
    return [
        *(
            _Picture(name, title, words, Markup(plots.as_svg(figure, name)))
            for name, title, words, figure in figures
        ),
        _Picture(
            "groups", "Coupled channels",
            "Left: kernels, in the order they run. Right: groups of coupled channels, with the numbers that autogate "
            "inspect has.",
            groups,
        ),
    ]  # fmt: skip


def _of_gates(report: Report) -> list[tuple[str, str, str, Any]]:
    """The figures of a run with gates: name, title, one line of text, figure."""
    from autogate.reporting import plots

    last, course = report.gates[-1], plots.course(report.info, report.rows, report.result)
    return [
        ("course", "What is left, and the accuracy", "Epoch 0 is the dense model.", course),
        ("widths", "Channels of each layer", f"After epoch {last.epoch}.", plots.widths(report.info, last)),
        ("gates", "Gates", "Number of gates by value, after each epoch.", plots.gate_histogram(report.gates)),
    ]


def _of_subnets(report: Report) -> list[tuple[str, str, str, Any]]:
    """The same of a run of several widths."""
    from autogate.reporting import plots

    sizes = report.sizes
    course = plots.subnet_course(report.subnets, sizes)
    found = [
        ("course", "Accuracy of the subnets", "After each epoch; in epoch 0 they have the dense weights.", course),
        ("widths", "Channels of each layer", "In each subnet.", plots.subnet_widths(report.info, sizes)),
    ]
    if all(one.seconds is not None for one in sizes):
        flops, latency = (plots.subnet_accuracy(sizes, by_time) for by_time in (False, True))
        words = "Measured at the end of the run, on its machine."
        found += [
            ("flops", "Accuracy and FLOPs", "At the end of the run.", flops),
            ("times", "Accuracy and latency", words, latency),
        ]
    return found


def _of_choice(report: Report) -> list[tuple[str, str, str, Any]]:
    """The same of a run with a choice for each image."""
    from autogate.reporting import plots

    course = plots.course(report.info, report.rows, report.result)
    words = "FLOPs of an image, a running mean in training; epoch 0 is the dense model."
    found = [("course", "Cost and accuracy", words, course)]
    if report.use is None:
        return found
    seen = f"On the {len(report.use.shares)} validation images."
    target = report.info.targets["FLOPs"]
    return [
        *found,
        ("use", "Channels that images never, sometimes and always use", seen, plots.use_of_layers(report.use)),
        ("channels", "How many channels images use", seen, plots.channels_of_images(report.use)),
        ("costs", "What images cost", seen, plots.costs_of_images(report.use, target)),
    ]


def _examples(folder: RunFolder) -> tuple[Examples, ...]:
    """The cheapest and the dearest images of a run with a choice for each image."""
    use = folder.use()
    if use is None or not all(file.is_file() for file in folder.picture_files):
        return ()
    found, costs = [], sorted(use.shares)
    titles = ("The cheapest images", "The dearest images")
    for title, file, those in zip(titles, folder.picture_files, (costs, costs[::-1]), strict=True):
        data = base64.b64encode(file.read_bytes()).decode()
        shown = tuple(f"{share:.1%}" for share in those[:SHOWN])
        found.append(Examples(title, f"data:image/png;base64,{data}", shown))
    return tuple(found)


def _kind(info: RunInfo) -> str:
    """What the run makes, in a few words."""
    if info.recipe.adaptive is not None:
        return "with a choice of channels for each image"
    return "with gates" if info.recipe.subnets is None else "in several widths"


def _subnet(size: SubnetSize) -> tuple[str, ...]:
    accuracy = "-" if size.accuracy is None else f"{size.accuracy:.2f} %"
    seconds = "-" if size.seconds is None else f"{1e3 * size.seconds:.3g}"
    return size.name, f"{size.flops:.1%}", f"{size.params:.1%}", accuracy, seconds


def _numbers(report: Report) -> list[tuple[str, str, str, str]]:
    """The rows of the table of results: a name, dense, now, and their ratio."""
    info, last, result = report.info, report.rows[-1], report.result
    flops, params = (last.flops * info.flops, last.params * info.params)
    accuracy = last.accuracy if last.ema_accuracy is None else last.ema_accuracy
    if result is not None:
        flops, params = result.flops, result.params
        accuracy = accuracy if result.accuracy is None else result.accuracy
    dense = report.rows[0].accuracy
    if info.recipe.adaptive is not None:
        return [
            ("FLOPs of an image, on average", short(info.flops), short(flops), f"{flops / info.flops:.1%}"),
            ("Accuracy", f"{dense:.2f} %", f"{accuracy:.2f} %", f"{accuracy - dense:+.2f}"),
        ]
    return [
        ("FLOPs", short(info.flops), short(flops), f"{flops / info.flops:.1%}"),
        ("Parameters", short(info.params), short(params), f"{params / info.params:.1%}"),
        ("Accuracy", f"{dense:.2f} %", f"{accuracy:.2f} %", f"{accuracy - dense:+.2f}"),
        ("Gates", str(last.gates), str(last.live), f"{last.live / last.gates:.1%}"),
    ]


def _layers(report: Report) -> list[tuple[str, str, str, str]]:
    """The rows of the table of layers: a name, channels before and after on both sides, FLOPs before."""
    last = report.gates[-1]

    def change(before: int, after: int) -> str:
        return str(before) if before == after else f"{before} → {after}"

    return [
        (layer.module, change(layer.inputs, inputs), change(layer.outputs, outputs), short(layer.flops))
        for layer, inputs, outputs in zip(report.info.layers, last.inputs, last.outputs, strict=True)
    ]


def _changes(result: Result | None) -> list[tuple[str, str]]:
    """Modules of the slim model that were removed or rewritten, and what was done."""
    if result is None:
        return []
    rewritten = [(path or "(the model)", f"forward rewritten: {why}") for path, why in result.rewritten.items()]
    return [(path, "removed: nothing was left in it") for path in result.removed] + rewritten


def _timing(row: Comparison) -> tuple[str, ...]:
    ratio = "-"
    if isinstance(row.dense, Duration) and isinstance(row.slim, Duration):
        ratio = f"{row.slim.median / row.dense.median:.2f}"
    return row.device, str(row.batch), str(row.dense), str(row.slim), ratio


def _options(info: RunInfo) -> list[tuple[str, Any]]:
    """The options of the run, without those that are off or have nothing to act on."""
    recipe, learning = info.recipe, info.recipe.learning
    idle = {
        "amp_dtype": not learning.amp,
        "model_ema_decay": not learning.model_ema,
        "warmup_lr": not learning.warmup_epochs,
        "decay_epochs": learning.sched != "step",
        "decay_rate": learning.sched not in ("step", "poly"),
        "round_to": recipe.budget.round_to == 1,
        "grad_accum_steps": learning.grad_accum_steps == 1,
        "momentum": "sgd" not in learning.opt and learning.opt not in ("momentum", "rmsprop", "nesterov"),
    }
    found: list[tuple[str, Any]] = []
    for name, value in asdict(recipe).items():
        parts = value.items() if isinstance(value, dict) else [(name, value)]
        words = {"name": "model"} | ({"weight": "distill weight"} if name == "distillation" else {})
        found += [
            (words.get(part, part).replace("_", " "), shown)
            for part, shown in parts
            if shown not in (None, False, (), {}, 0.0) and not idle.get(part, False)
        ]
    return found
