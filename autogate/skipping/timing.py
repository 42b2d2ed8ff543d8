"""Where gathering the channels of a layer breaks even with computing all of them, measured on this machine."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from autogate.inputs import Inputs
from autogate.skipping.break_even import BreakEven
from autogate.skipping.forwards import SkippingForward
from autogate.skipping.pooling import PoolingForward
from rewriters import run_eval, samples_in
from rewriters.interrupts import let_signals_in

SHARES = (0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125)
"""Of the channels that are on; tried from the largest on."""

REPETITIONS = 4
"""The fastest of so many runs counts: others were held up."""


@torch.inference_mode()
def measured(forward: SkippingForward | PoolingForward, input: Tensor) -> BreakEven:
    """Time a layer with its norm, with fewer and fewer of its channels on.

    Args:
        forward: the layer's.
        input: what it reads, of one image.
    """
    let_signals_in()
    dense = _seconds(lambda: forward.trial(input, 1.0, 1.0))
    if not forward.rows:
        columns = _largest(lambda share: _seconds(lambda: forward.trial(input, 1.0, share)) < dense)
        return BreakEven(columns, columns)
    work = _largest(lambda share: _seconds(lambda: forward.trial(input, share, 1.0)) < dense)
    if not work or not forward.columns:
        return BreakEven(work, 0.0)
    rows = _seconds(lambda: forward.trial(input, 0.5, 1.0))
    return BreakEven(work, _largest(lambda share: _seconds(lambda: forward.trial(input, 0.5, share)) < rows))


def _largest(wins: Callable[[float], bool]) -> float:
    return next((share for share in SHARES if wins(share)), 0.0)


def _seconds(call: Callable[[], Tensor]) -> float:
    best = float("inf")
    for _ in range(REPETITIONS):
        start = time.perf_counter()
        if call().is_cuda:
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return best


def inputs_of(model: nn.Module, paths: Sequence[str], call: Inputs) -> dict[str, Tensor]:
    """What modules read of the first sample of a call, by path; those that don't run are missing."""
    samples = samples_in(*call)
    args, kwargs = tree_map_only(Tensor, lambda x: x[:1] if x.ndim and len(x) == samples else x, call)
    found: dict[str, Tensor] = {}
    handles = []
    for path in paths:

        def note(module: nn.Module, given: Sequence[Tensor], path: str = path) -> None:
            if given:
                found.setdefault(path, given[0][:1])

        handles.append(model.get_submodule(path).register_forward_pre_hook(note))
    try:
        run_eval(model, args, kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return found
