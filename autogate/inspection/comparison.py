"""How long a slim model takes beside the dense one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.benchmark import Timer

from autogate.files import inputs_of
from autogate.inputs import Inputs


@dataclass(frozen=True)
class Duration:
    """Seconds that a forward pass takes, over several measurements.

    Attributes:
        median: of all measurements.
        low, high: quartiles.
    """

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Comparison:
    """A dense and a slim model on the same inputs.

    Attributes:
        device: "cpu", "cuda".
        compiled: by torch.compile.
        batch: samples.
        dense, slim: seconds a batch takes, or why it could not be run.
    """

    device: str
    compiled: bool
    batch: int
    dense: Duration | str
    slim: Duration | str


def compare(
    dense: nn.Module, slim: nn.Module, *, batches: Sequence[int] = (1, 64), devices: Sequence[str] | None = None,
    compiled: Sequence[bool] = (False, True), seconds: float = 1.0, side: int | None = None,
) -> Iterator[Comparison]:  # fmt: skip
    """Time both models in eval mode, the one after the other in turns so that both see the same machine.

    Args:
        dense, slim: moved to each device, and put in eval mode.
        batches: numbers of samples.
        devices: the CPU and, where there is one, the GPU, if None.
        compiled: whether by torch.compile; both in turn by default.
        seconds: to measure each for, at the least.
        side: of square images, if not that of `prepare`.
    """
    for device in devices or ("cpu", *(("cuda",) if torch.cuda.is_available() else ())):
        dense, slim = dense.to(device).eval(), slim.to(device).eval()
        for by_compiler in compiled:
            for batch in batches:
                inputs = inputs_of(slim, batch, side)
                found = _in_turns([dense, slim], inputs, by_compiler, seconds)
                yield Comparison(device, by_compiler, batch, *found)


def _in_turns(models: list[nn.Module], inputs: Inputs, by_compiler: bool, seconds: float) -> list[Duration | str]:
    rounds = 3
    timers: list[Timer | str] = [_timer(model, inputs, by_compiler) for model in models]
    times: list[list[float]] = [[] for _ in models]
    for _ in range(rounds):
        for timer, found in zip(timers, times, strict=True):
            if isinstance(timer, Timer):
                found.extend(timer.blocked_autorange(min_run_time=seconds / rounds).times)
    return [timer if isinstance(timer, str) else _latency(found) for timer, found in zip(timers, times, strict=True)]


def _timer(model: nn.Module, inputs: Inputs, by_compiler: bool) -> Timer | str:
    """A timer whose model has run, or why it doesn't run."""
    args, kwargs = inputs
    try:
        torch.compiler.reset()
        run: Any = torch.compile(model) if by_compiler else model
        with torch.inference_mode():
            run(*args, **kwargs)
    except Exception as error:  # no compiler, too little memory
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
    names = {"run": run, "args": args, "kwargs": kwargs, "torch": torch}
    statement = "with torch.inference_mode(): run(*args, **kwargs)"
    return Timer(statement, globals=names, num_threads=torch.get_num_threads())


def _latency(times: list[float]) -> Duration:
    low, median, high = torch.tensor(times, dtype=torch.float64).quantile(torch.tensor([0.25, 0.5, 0.75]).double())
    return Duration(float(median), float(low), float(high))
