"""Ctrl-C at random moments: what it leaves of the model and of PyTorch.

    python -m benchmarks.interrupts --draws 500

Each draw sends SIGINT to the process at a random moment of `prepare`, `finalize` or `load`. Counted is what was found
afterwards: the model as it was, or the work done and whole (the signal came at the end, or too late); or something
broken: the model's tensors, modes or modules changed, or a patch, a mode or a handler left behind. Nothing may break.
"""

from __future__ import annotations

import argparse
import builtins
import collections
import contextlib
import copy
import gc
import os
import random
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode_stack
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

import autogate
from autogate.slim import history_of
from benchmarks.parts import kill

EXAMPLE = torch.randn(2, 3, 8, 8)


class Network(nn.Module):
    """A forward that has to be traced, because it holds a size, and a shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.inner, self.outer = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 8, 1), nn.Conv2d(8, 16, 1)
        self.norm, self.fc = nn.BatchNorm2d(16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu()
        x = x + self.outer(self.inner(x).relu())
        one, two = x.chunk(2, 1)
        return self.fc(torch.cat([two, one], 1).mean((2, 3)))


def of_process() -> list[Any]:
    """All that the verbs patch or set meanwhile."""
    patched = (nn.Module, torch.autocast, torch.autograd.Function, torch, torch.nn.functional, builtins)
    names = (
        "__call__", "__getattr__", "__setattr__", "training", "__enter__", "apply",
        "zeros", "relu", "isinstance", "len",
    )  # fmt: skip
    return [
        *(getattr(one, name, None) for one in patched for name in names if name in vars(one)),
        _get_current_dispatch_mode_stack(), _get_current_function_mode_stack(), torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(), torch.backends.mha.get_fastpath_enabled(), gc.get_freeze_count(),
        torch.get_float32_matmul_precision(), [signal.getsignal(number) for number in signal.valid_signals()],
        torch.get_rng_state().tolist(), random.getstate(),
    ]  # fmt: skip


def of_model(model: nn.Module) -> list[Any]:
    """Its modules with their modes, attributes and hooks, and the values of its tensors."""
    modules = [
        (
            path,
            id(module),
            module.training,
            sorted(vars(module)),
            [id(one) for one in module._forward_pre_hooks.values()],
        )
        for path, module in model.named_modules()
    ]
    return [modules, {name: (id(value), value.tolist()) for name, value in model.state_dict(keep_vars=True).items()}]


def trial(
    verb: Callable[[nn.Module], Any], model: nn.Module, is_done: Callable[[nn.Module], bool], after: float
) -> str:
    """Send SIGINT so many seconds after the verb has begun; what was found then."""
    process, own = of_process(), of_model(model)
    arrived: list[int] = []
    ctrl_c = threading.Timer(after, lambda: (arrived.append(1), os.kill(os.getpid(), signal.SIGINT)))
    interrupted = False
    try:
        ctrl_c.start()  # the signal may come before this returns
        verb(model)
        ctrl_c.join()
        time.sleep(1e-3)  # it arrives here at the latest
    except KeyboardInterrupt:
        interrupted = True
    if not interrupted:
        return "broken: the signal was lost"
    if of_process() != process:
        return "broken: PyTorch or the process"
    if is_done(model):
        return "done and whole" if model(EXAMPLE).isfinite().all() else "broken: the model"
    return "as it was" if of_model(model) == own else "broken: the model"


def gated() -> nn.Module:
    model = autogate.prepare(dense(), EXAMPLE, flops=1.0)
    kill(model, 0.4, 0)
    autogate.gates(model).fold()
    return model


def dense() -> nn.Module:
    torch.manual_seed(0)
    return Network()


@contextlib.contextmanager
def _sigint_raises() -> Iterator[None]:
    """Inside, SIGINT raises KeyboardInterrupt: a process that was started in the background may ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _has_history(model: nn.Module) -> bool:
    return history_of(model) is not None and "autogate" not in model._modules


def counts(verb: str, draws: int, seed: int = 0) -> collections.Counter[str]:
    """What was found after interrupts at random moments of "prepare", "finalize" or "load"."""
    draw = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder, _sigint_raises():
        file = Path(folder) / "slim.safetensors"
        autogate.save(autogate.finalize(gated(), warn=False), file)
        model, call, is_done = {
            "prepare": (
                dense(), lambda one: autogate.prepare(one, EXAMPLE, shortcuts="conv"),
                lambda one: "autogate" in one._modules,
            ),
            "finalize": (gated(), lambda one: autogate.finalize(one, warn=False), _has_history),
            "load": (dense(), lambda one: autogate.load(file, one), _has_history),
        }[verb]  # fmt: skip
        call(copy.deepcopy(model))
        began = time.perf_counter()
        call(copy.deepcopy(model))
        seconds = time.perf_counter() - began
        found = collections.Counter[str]()
        current = copy.deepcopy(model)
        for _ in range(draws):
            outcome = trial(call, current, is_done, draw.uniform(0, 1.05 * seconds))
            found[outcome] += 1
            if outcome != "as it was":
                current = copy.deepcopy(model)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=500, help="interrupts of each verb")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    print("| verb | as it was | done and whole | broken |\n| --- | --- | --- | --- |")
    for verb in ("prepare", "finalize", "load"):
        found = counts(verb, asked.draws, asked.seed)
        broken = {name: count for name, count in found.items() if name.startswith("broken")}
        print(f"| {verb} | {found['as it was']} | {found['done and whole']} | {broken or 0} |", flush=True)


if __name__ == "__main__":
    main()
