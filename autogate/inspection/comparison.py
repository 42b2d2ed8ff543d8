"""Measure how long a slim model takes, compared with the dense one."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

from autogate.budget import timer
from autogate.files import inputs_of, write_onnx
from autogate.inputs import Inputs
from autogate.switching import Structure, Subnets, subnets_of
from rewriters.recording import tensors_of


@dataclass(frozen=True)
class Duration:
    """Seconds of a forward pass, over several measurements; printed in milliseconds.

    Attributes:
        median: median of all measurements.
        low, high: quartiles.
    """

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        low, median, high = (f"{1e3 * seconds:.3g}" for seconds in (self.low, self.median, self.high))
        return f"{median} ({low} to {high})"


@dataclass(frozen=True)
class Comparison:
    """A dense and a slim model on the same inputs.

    Attributes:
        device: "cpu" or "cuda".
        runner: "eager", "compiled" by torch.compile, or "onnxruntime".
        batch: number of samples.
        dense, slim: seconds per batch, or why the model could not be run.
    """

    device: str
    runner: str
    batch: int
    dense: Duration | str
    slim: Duration | str


def compare(
    dense: nn.Module, slim: nn.Module, *, batches: Sequence[int] = (1, 64), devices: Sequence[str] | None = None,
    compiled: Sequence[bool] = (False, True), seconds: float = 1.0, side: int | None = None,
) -> Iterator[Comparison]:  # fmt: skip
    """Time both models in eval mode. They take turns, so that both see the machine in the same state.

    Args:
        dense, slim: the models. They are moved to each device and put in eval mode.
        batches: numbers of samples.
        devices: devices; the CPU and, if there is one, the GPU if None.
        compiled: whether to use torch.compile; by default both without and with it.
        seconds: minimum time to measure each model for.
        side: side of square images, if not that of the example inputs.
    """
    for device in devices or ("cpu", *(("cuda",) if torch.cuda.is_available() else ())):
        dense, slim = dense.to(device).eval(), slim.to(device).eval()
        for by_compiler in compiled:
            for batch in batches:
                inputs = inputs_of(slim, batch, side)
                found = time_in_turns([dense, slim], inputs, seconds, by_compiler)
                yield Comparison(device, "compiled" if by_compiler else "eager", batch, *found)


def compare_onnx(
    dense: nn.Module, slim: nn.Module, *, batches: Sequence[int] = (1, 64), seconds: float = 1.0,
    side: int | None = None,
) -> Iterator[Comparison]:  # fmt: skip
    """Time the ONNX files of both models in onnxruntime, on the CPU with as many threads as torch has.

    Args:
        dense, slim: the models; they are moved to the CPU and put in eval mode.
        batches, seconds, side: as for `compare`.

    Raises:
        AutogateError: as for `autogate.to_onnx`.
    """
    draw = partial(inputs_of, slim, side=side)
    runs = [_in_onnxruntime(model.to("cpu").eval(), draw) for model in (dense, slim)]
    for batch in batches:
        arrays = tuple(tensor.numpy() for tensor in tensors_of(draw(batch)))
        yield Comparison("cpu", "onnxruntime", batch, *time_in_turns(runs, (arrays, {}), seconds))


def _in_onnxruntime(model: nn.Module, draw: Callable[[int], Inputs]) -> Callable[..., Any]:
    """The model's ONNX file, to be called with arrays."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        write_onnx(model, path, draw)
        import onnxruntime  # not above: it is optional

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        session = onnxruntime.InferenceSession(path.read_bytes(), options, providers=["CPUExecutionProvider"])
    names = [entry.name for entry in session.get_inputs()]
    return lambda *arrays: session.run(None, dict(zip(names, arrays, strict=True)))


@dataclass(frozen=True)
class SubnetTimes:
    """How long a subnet of a switchable model takes, in it.

    Attributes:
        structure: the subnet's channels and shares.
        times: of a forward, for each batch size: seconds, or why it could not be run.
        switch_new, switch_kept: seconds of a switch to it, when its slices have to be taken, and when they are kept.
    """

    structure: Structure
    times: tuple[Duration | str, ...]
    switch_new: float
    switch_kept: float


def time_subnets(
    model: nn.Module, batches: Sequence[int] = (1, 64), seconds: float = 1.0, side: int | None = None
) -> list[SubnetTimes]:
    """Time the subnets of a switchable model in eval mode, and switching to them.

    Args:
        model: the model, put in eval mode.
        batches: numbers of samples.
        seconds: minimum time to measure each subnet and batch size for.
        side: side of square images, if not that of the example inputs.
    """
    subnets, model = subnets_of(model), model.eval()
    assert subnets is not None
    found = []
    for number, subnet in enumerate(subnets.subnets):
        times: list[Duration | str] = []
        with subnets.switched(model, number):
            for batch in batches:
                times += time_in_turns([model], inputs_of(model, batch, side), seconds)
        found.append(SubnetTimes(subnet.structure, tuple(times), *_switch_times(model, subnets, number)))
    return found


@torch.no_grad()
def _switch_times(model: nn.Module, subnets: Subnets, number: int) -> tuple[float, float]:
    """Median seconds of switches to a subnet from another one: with its slices gone, and kept."""
    new: list[float] = []
    kept: list[float] = []
    for _ in range(10):
        for times, forgets in ((new, True), (kept, False)):
            subnets.switch(model, (number + 1) % len(subnets.subnets))
            if forgets:
                subnets.subnets[number].forget()
            began = time.perf_counter()
            subnets.switch(model, number)
            times.append(time.perf_counter() - began)
    return statistics.median(new), statistics.median(kept)


def time_in_turns(
    models: Sequence[Callable[..., Any]], inputs: Inputs, seconds: float, by_compiler: bool = False
) -> list[Duration | str]:
    """Time the forwards of models that take turns, so that all see the machine in the same state.

    Args:
        models: models in eval mode, or functions.
        inputs: what each is run on.
        seconds: minimum time to measure each model for.
        by_compiler: whether to use torch.compile.

    Returns:
        For each model its time, or why it could not be run.
    """
    rounds = 3
    timed = [_timer(model, inputs, by_compiler) for model in models]
    times: list[list[float]] = [[] for _ in models]
    for _ in range(rounds):
        for one, found in zip(timed, times, strict=True):
            if not isinstance(one, str):
                found.extend(one.blocked_autorange(min_run_time=seconds / rounds).times)
    return [one if isinstance(one, str) else _latency(found) for one, found in zip(timed, times, strict=True)]


def _timer(model: Callable[..., Any], inputs: Inputs, by_compiler: bool) -> Any:
    """A timer for a model that has run once, or why the model doesn't run."""
    args, kwargs = inputs
    try:
        torch.compiler.reset()
        run: Any = torch.compile(model) if by_compiler else model
        with torch.inference_mode():
            run(*args, **kwargs)
    except Exception as error:  # such as a missing compiler or too little memory
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
    names = {"run": run, "args": args, "kwargs": kwargs, "torch": torch}
    return timer("with torch.inference_mode(): run(*args, **kwargs)", names)


def _latency(times: list[float]) -> Duration:
    low, median, high = torch.tensor(times, dtype=torch.float64).quantile(torch.tensor([0.25, 0.5, 0.75]).double())
    return Duration(float(median), float(low), float(high))
