"""One timm model of each file, if most of its work is in convolutions: choosing channels for each image, start to end.

    python -m benchmarks.adaptive_coverage --out runs/adaptive.jsonl
    python -m benchmarks.adaptive_coverage --out runs/adaptive.jsonl --table

Each model runs in a process of its own, with a limit on memory and on time, and gets a line of JSON. Those that have
failed are run again, with larger images (`--size 128`) for instance, and the last line counts. Weights are random, and
norms have the statistics of a batch. A model is prepared and trained for three steps. Then codes are drawn at random,
and it is finalized: whatever is off is skipped. The outputs are compared with those of the masked form, for a batch of
one and of four: in float32, and in float64 too where they differ by more than rounding of a few layers.
"""

from __future__ import annotations

import argparse
import copy
import fnmatch
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from autogate import adaptive
from autogate.slim import AnalysisOptions, analyse_channels
from benchmarks.adaptive_time import draw_codes, noise
from benchmarks.coverage import Limits, apart
from benchmarks.coverage_model import DOUBLE, SINGLE, build
from benchmarks.model_lists import TORCHVISION, Listed, listed, smallest_of_each_file
from benchmarks.parts import append, lines, settle_norms
from rewriters import relative_error
from rewriters.recording import tensors_of

STEPS, IMAGES = 3, 8

OPEN = 0.6
"""The share of the channels that is on for an image."""

OTHER = "mostly other layers"
"""Where a model ends most of whose FLOPs aren't in convolutions."""

DONE = "done"


@dataclass
class Result:
    """What happened to a model.

    Attributes:
        model, family: its name, and the file that it is defined in.
        step: the step that failed, `DONE` or `OTHER`.
        convolutions: the share of its FLOPs in convolutions.
        chosen, layers: number of layers that choose their channels, and of all.
        fixed: the share of the FLOPs that every image takes.
        cost: the mean share that the images took with the codes that were drawn.
        one, four: largest relative difference of the outputs that skip from the masked ones, for these batches.
        double: the larger of these in float64, if one of them is larger than `SINGLE`.
        error: what was raised.
    """

    model: str
    family: str
    step: str = "build"
    convolutions: float | None = None
    chosen: int = 0
    layers: int = 0
    fixed: float | None = None
    cost: float | None = None
    one: float | None = None
    four: float | None = None
    double: float | None = None
    error: str = ""


def run(one: Listed, out: Path) -> None:
    """Run one model in this process; `out` always has what is known so far."""
    result = Result(one.name, one.family)

    def at(step: str) -> None:
        result.step = step
        out.write_text(json.dumps(asdict(result)))

    try:
        measure(one, result, at)
    except Exception as error:  # whatever a model raises is a line of the table
        result.error = f"{type(error).__name__}: {error}"[:600]
        at(result.step)


def measure(one: Listed, result: Result, at: Callable[[str], None]) -> None:
    """Take a model through all steps, and fill in its result."""
    at("build")
    model, (args, _) = build(one)
    images = noise(IMAGES, args[0].shape[-1])
    settle_norms(model, ((images,), {}))
    result.convolutions = share_of_convolutions(model, (images[:2],))
    if result.convolutions <= 0.5:
        at(OTHER)
        return
    at("prepare")
    adaptive.prepare(model, images[:2], flops=0.99, steps=STEPS, warmup=0.0)
    counting = adaptive.bank(model).counting
    kinds = [layer.kind for layer in counting.layers]
    result.chosen, result.layers = kinds.count("chosen"), len(kinds)
    at("train")
    train(model, images[:2])
    result.fixed = counting.fixed(adaptive.bank(model).notes.calls).share
    at("finalize")
    trained = copy.deepcopy(model)
    result.one, result.four, result.cost = compared(model, images)
    if max(result.one, result.four) > SINGLE:
        at("float64")
        with mock.patch.object(Tensor, "float", Tensor.double):  # some compute a part in float32
            result.double = max(compared(trained.double(), images.double())[:2])
    at(DONE)


def share_of_convolutions(model: nn.Module, inputs: tuple[Tensor, ...]) -> float:
    """The share of a model's FLOPs that its convolutions have."""
    channel_map = analyse_channels(model, AnalysisOptions((inputs, {}), {})).channel_map
    everything = torch.ones(channel_map.size, dtype=torch.bool)
    modules = dict(model.named_modules())
    found = {kernel: channel_map.macs(kernel, everything) for kernel in channel_map.kernels}
    within = (macs for kernel, macs in found.items() if isinstance(modules.get(kernel.module), _ConvNd))
    return sum(within) / max(1.0, sum(found.values()))


def train(model: nn.Module, images: Tensor) -> None:
    """Three steps."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)
    model.train()
    for _ in range(STEPS):
        optimizer.zero_grad()
        sum(out.square().mean() for out in tensors_of(model(images))).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)  # gradients of deep random networks may be huge
        optimizer.step()


def compared(model: nn.Module, images: Tensor) -> tuple[float, float, float]:
    """Draw codes and finalize a model. Returns its differences from the masked form, and the mean share of the FLOPs.

    The differences are of the outputs, for batches of one and of four.
    """
    draw_codes(model.eval(), images, OPEN)
    masked = copy.deepcopy(model)
    adaptive.finalize(model, images[:2], batches=[images], break_even=1.0, warn=False)
    model.eval()
    with torch.inference_mode():
        wanted = [tensors_of(masked(images[:size])) for size in (1, 4)]
        found = [tensors_of(model(images[:size])) for size in (1, 4)]
    one, four = (relative_error(*both) for both in zip(found, wanted, strict=True))
    return one, four, adaptive.use(model, [images]).mean.share


def exact(row: dict[str, Any]) -> bool:
    """Whether a model went through all steps with the outputs of its masked form."""
    if row["step"] != DONE:
        return False
    return max(row["one"], row["four"]) <= SINGLE if row["double"] is None else row["double"] <= DOUBLE


def table(found: list[dict[str, Any]]) -> str:
    """The rows as Markdown: what went well in one sentence, and a row for each model that didn't."""
    found = list({row["model"]: row for row in found}.values())  # the last one counts
    tried = [row for row in found if row["step"] != OTHER]
    fine = [row for row in tried if exact(row)]
    single = [row for row in fine if row["double"] is None]
    text = [
        f"{len(found)} models, one of each file; in {len(tried)} most of the FLOPs are in convolutions. {len(fine)} of "
        f"these went through all steps with the outputs of the masked form: {len(single)} within {SINGLE:.0e} in "
        f"float32, {len(fine) - len(single)} within {DOUBLE:.0e} in float64.",
    ]
    rest = [row for row in tried if not exact(row)]
    if rest:
        text += ["", "| model | step | why |", "| --- | --- | --- |"]
        text += [f"| {row['model']} | {row['step']} | {why(row)} |" for row in rest]
    return "\n".join(text)


def why(row: dict[str, Any]) -> str:
    """Why a model isn't exact."""
    if row["error"]:
        return row["error"].replace("|", "\\|").replace("\n", " ")
    return f"outputs differ by {max(row['one'], row['four']):.0e}, in float64 by {row['double']:.0e}"


def one_of_each_file(patterns: Iterable[str], size: int, cache: Path) -> Iterator[Listed]:
    """The smallest of each file's models whose names match; files with few models first: they are counted fast."""
    files: dict[str, list[Listed]] = {}
    for one in listed(size):
        if not one.name.startswith(TORCHVISION) and any(fnmatch.fnmatchcase(one.name, p) for p in patterns):
            files.setdefault(one.family, []).append(one)
    for models in sorted(files.values(), key=len):
        yield from smallest_of_each_file(models, cache)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/adaptive.jsonl"))
    parser.add_argument("--models", nargs="*", default=["*"], help="patterns of names, for fnmatch")
    parser.add_argument("--size", type=int, default=64, help="side of the images, for models that take any size")
    parser.add_argument("--memory", type=float, default=8.0, help="limit on a model's memory, in GiB")
    parser.add_argument("--seconds", type=int, default=120, help="limit on a model's processor time")
    parser.add_argument("--table", action="store_true", help="print the table of the file instead")
    given = parser.parse_args()
    if given.table:
        print(table(lines(given.out)))
        return
    done = {row["model"] for row in lines(given.out) if row["step"] in (DONE, OTHER)}
    limits = Limits(given.memory, given.seconds)
    for one in one_of_each_file(given.models, given.size, given.out.parent / "parameters.json"):
        if one.name in done:
            continue
        found, ended = apart(run, one, limits)
        row = found or asdict(Result(one.name, one.family))
        row["error"] = row["error"] or ended
        append(given.out, row)
        print(one.name, row["step"], row["one"], row["four"], row["double"], row["error"][:200], flush=True)


if __name__ == "__main__":
    main()
