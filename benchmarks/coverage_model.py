"""Measurements of one model, in a process that `benchmarks.coverage` starts.

The process first runs a small model, so that imports and other one-time work are not charged to the measured model.
Memory is as Linux reports it.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn

import autogate
import rewriters
from autogate.inputs import Inputs
from benchmarks.model_lists import Listed
from benchmarks.parts import kill, randomise_constants, randomise_norms, settle_norms, spread
from rewriters import outputs
from rewriters.recording.capture import capture

DEAD = 0.5
"""Share of the classes that die."""

SEEDS = (0, 1, 2)
"""Seeds of the patterns: FLOPs left are the mean over all, exactness is measured on the first."""

FORKED = multiprocessing.get_context("fork")

SINGLE, DOUBLE = 1e-5, 1e-10
"""Accepted differences of outputs in float32 and in float64. float64 is tried only if float32 exceeds its own."""


@dataclass
class Result:
    """The measurements of a model.

    Attributes:
        model, family: name of the model, and the file that it is defined in.
        arguments: arguments that it was built with, besides its name.
        image: side of the images, or shape of the example.
        params: number of parameters.
        step: the step that failed ("build", "prepare", "kill", "finalize", "float64", "memory", "time"); empty if none
            did.
        error: text of the failure.
        difference: largest relative difference between gated and slim outputs, in float32.
        spread: relative distance between the gated outputs of two samples; smaller differences don't count.
        double_difference: the difference in float64, if float32's is larger than `SINGLE`.
        reach: share of the FLOPs in layers with a gate on their input or output side.
        left: share of the FLOPs with half of the classes dead, mean of three patterns.
        classes: number of gates.
        prepare_s, finalize_s: seconds of processor time, on one thread.
        prepare_bytes: peak memory of prepare, above what the process had before; pages of libraries' code don't count.
        model_bytes: bytes of parameters and buffers.
        graph_bytes: growth of the process when it captured the model's graph.
        peak_bytes: peak memory of the process at the end.
        pinned: share of the FLOPs that gates don't reach, by the op and reason that pin a side of such a layer.
    """

    model: str
    family: str
    arguments: dict[str, Any] = field(default_factory=dict)
    image: str = ""
    params: int = 0
    step: str = ""
    error: str = ""
    difference: float | None = None
    spread: float | None = None
    double_difference: float | None = None
    reach: float | None = None
    left: float | None = None
    classes: int | None = None
    prepare_s: float | None = None
    finalize_s: float | None = None
    prepare_bytes: int | None = None
    model_bytes: int | None = None
    graph_bytes: int | None = None
    peak_bytes: int | None = None
    pinned: dict[str, float] = field(default_factory=dict)


def build(one: Listed, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Inputs]:
    """The model with random norms, and a batch of two to run it on."""
    torch.manual_seed(0)
    model = one.build()
    randomise_norms(model)
    randomise_constants(model)
    inputs = one.inputs(model)
    cast = lambda value: value.to(dtype) if value.is_floating_point() else value  # noqa: E731
    return model.to(dtype), torch.utils._pytree.tree_map_only(torch.Tensor, cast, inputs)


def measure(one: Listed, prepare_only: bool = False) -> Iterator[Result]:
    """Yields the result as far as it is known, after each step; the last one counts."""
    result = Result(one.name, one.family, one.arguments, step="build")
    yield result
    autogate.prepare(*small())
    model, inputs = build(one)
    result.image = "x".join(str(size) for size in one.shape(inputs))
    result.params = sum(parameter.numel() for parameter in model.parameters())
    result.model_bytes = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    yield result
    result.step = "prepare"
    result.graph_bytes = _graph_bytes(model, inputs)
    highest, before = _memory("VmHWM"), _memory("RssAnon")
    _forget_peak()
    model, result.prepare_s = prepared(model, inputs)
    result.prepare_bytes = _memory("VmHWM") - _memory("RssFile") - before
    _read_summary(result, model)
    if prepare_only:
        result.step = ""
        yield result
        return
    yield result
    result.step = "kill"
    kill(model, DEAD, SEEDS[0])
    settle_norms(model, inputs)
    result.step = "finalize"
    yield result
    result.difference, result.spread, result.finalize_s = _finalize(model, inputs)
    if not result.difference <= SINGLE:
        result.step = "float64"
        yield result
        with mock.patch.object(torch.Tensor, "float", torch.Tensor.double):  # some compute a part in float32
            model, inputs = build(one, torch.float64)
            model, _ = prepared(model, inputs)
            kill(model, DEAD, SEEDS[0])
            settle_norms(model, inputs)
            result.double_difference, *_ = _finalize(model, inputs)
    result.step, result.peak_bytes = "", max(highest, _memory("VmHWM"))
    yield result


class Small(nn.Module):
    """A few layers that trigger all one-time work of a process, so that no measured model is charged for it.

    Norms, attention and a size-dependent forward: the modules that analyse them are imported when first needed.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.LayerNorm(8)
        self.qkv, self.head = nn.Linear(8, 24), nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = self.norm(self.bn(self.stem(x)).relu().flatten(2).transpose(1, 2))
        query, key, value = self.qkv(rows).reshape(len(x), -1, 3, 2, 4).permute(2, 0, 3, 1, 4)
        heads = nn.functional.scaled_dot_product_attention(query, key, value)
        return self.head(heads.transpose(1, 2).flatten(2).mean(1))


def small() -> tuple[nn.Module, torch.Tensor]:
    """The small model and a batch for it."""
    return Small(), torch.zeros(2, 3, 8, 8)


def _forget_peak() -> None:
    """Reset the process's peak memory."""
    Path("/proc/self/clear_refs").write_text("5")


def _memory(of: str) -> int:
    """Bytes of memory: "VmHWM" is the peak, "RssAnon" what this process has now, "RssFile" the files mapped into it."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(rf"{of}:\s+(\d+) kB", status)[1]) * 1024


def _graph_bytes(model: nn.Module, inputs: Inputs) -> int | None:
    """Memory of the captured graph; None if the model can't be captured.

    It is captured in a child process, so that this process is unchanged when prepare runs.
    """
    here, there = FORKED.Pipe(duplex=False)
    child = FORKED.Process(target=_tell_graph_bytes, args=(model, inputs, there))
    child.start()
    there.close()
    try:
        return here.recv()
    except EOFError:
        return None
    finally:
        child.join()


def _tell_graph_bytes(model: nn.Module, inputs: Inputs, to: Connection) -> None:
    before = _memory("RssAnon")
    with contextlib.suppress(autogate.AutogateError):
        captured = capture(model.eval(), *inputs)
        to.send(_memory("RssAnon") - before)
        del captured  # it has to live until here


def prepared(model: nn.Module, inputs: Inputs) -> tuple[nn.Module, float]:
    """The prepared model, and the seconds of processor time it took."""
    start = time.process_time()
    model = autogate.prepare(model, inputs[0] or inputs[1], flops=1.0)
    return model, time.process_time() - start


def _finalize(model: nn.Module, inputs: Inputs) -> tuple[float, float, float]:
    """(relative difference of the outputs that finalize compares, their spread, seconds), whatever the difference.

    A model that computes something else in train mode is compared in that mode too: the larger difference counts.
    """
    found: list[tuple[float, float]] = []

    def note(got: list[torch.Tensor], wanted: list[torch.Tensor], rounding: Sequence[float] = ()) -> float:
        found.append((rewriters.relative_error(got, wanted), spread(wanted)))
        return 0.0

    with mock.patch.object(outputs, "relative_error", note):
        start = time.process_time()
        autogate.finalize(model, inputs[0] or inputs[1], warn=False, probe=False)
        took = time.process_time() - start
    return *max(found), took


def _read_summary(result: Result, model: nn.Module) -> None:
    summary, channel_map = autogate.summary(model), autogate.gates(model).channel_map
    whole = summary.all_flops
    result.classes, result.reach = channel_map.size, summary.reach
    left = []
    for seed in SEEDS:
        live = torch.rand(channel_map.size, generator=torch.Generator().manual_seed(seed)) >= DEAD
        left.append(_left(channel_map, live) / whole)
    result.left = sum(left) / len(left)
    result.pinned = {place: macs / whole for place, macs in _out_of_reach(channel_map).items()}


def _left(channel_map: rewriters.ChannelMap, live: torch.Tensor) -> float:
    survivors = channel_map.survivors(live)
    return sum(channel_map.macs(kernel, survivors) for kernel in channel_map.kernels)


def _out_of_reach(channel_map: rewriters.ChannelMap) -> dict[str, float]:
    """Multiply-adds of layers without a gate on either side, by the pin on one of their sides."""
    places: dict[rewriters.Side, set[str]] = {}
    for pin in channel_map.pins:
        for side in pin.sides:
            places.setdefault(side, set()).add(f"{pin.op.removeprefix('aten.')}: {pin.reason}")
    found: dict[str, float] = {}
    everything = torch.ones(channel_map.size, dtype=torch.bool)
    for kernel in channel_map.kernels:
        sides = {kernel.input_side, kernel.output_side}
        if not channel_map.reached(kernel):
            macs = channel_map.macs(kernel, everything)
            computed = {"a kernel that is no parameter"} if kernel.computed else set()
            for place in computed.union(*(places.get(side, set()) for side in sides)) or {"no pin"}:
                found[place] = found.get(place, 0.0) + macs
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def measure_here(one: Listed, out: Path, prepare_only: bool = False) -> None:
    """Measure in this process. `out` always has what is known so far, because the process may be killed."""
    result = Result(one.name, one.family, one.arguments)
    try:
        for result in measure(one, prepare_only):
            out.write_text(json.dumps(asdict(result)))
    except MemoryError as error:
        result.step, result.error = "memory", str(error)
    except Exception as error:
        short_of_memory = "can't allocate memory" in str(error)
        result.error = f"{type(error).__name__}: {error}"[:600]
        result.step = "memory" if short_of_memory else result.step
    out.write_text(json.dumps(asdict(result)))
