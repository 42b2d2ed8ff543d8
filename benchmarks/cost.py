"""What gates cost: time of prepare, time and memory of a training step, and the slim model's latency.

    python -m benchmarks.cost
    python -m benchmarks.cost --scaling     # only how prepare and the gates' step grow with layers and classes
    python -m benchmarks.cost --peer        # only prepare beside Torch-Pruning (pip install torch-pruning)

Times are medians of runs that take turns, so that a drifting machine is fair to both sides, and are printed as ratios.
Peak memory is measured in a separate process for each side: resident memory on a CPU, allocated memory on a GPU.
"""

from __future__ import annotations

import argparse
import copy
import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import autogate
from autogate.inputs import as_call
from benchmarks.peer import torch_pruning

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def synchronise() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def seconds(run: Callable[[], object]) -> float:
    synchronise()
    start = time.perf_counter()
    run()
    synchronise()
    return time.perf_counter() - start


class InTurn(NamedTuple):
    """Seconds of two things that run in turn, and the ratio of the second's to the first's."""

    first: float
    second: float
    ratio: float
    lower: float
    upper: float

    def __str__(self) -> str:
        return f"ratio {self.ratio:.3f} (quartiles {self.lower:.3f} to {self.upper:.3f})"


def in_turn(first: Callable[[], object], second: Callable[[], object], rounds: int) -> InTurn:
    """Medians over `rounds`, after one warm-up run of each. The two take turns in going first."""
    first(), second()
    pairs = []
    for index in range(rounds):
        if index % 2:
            b, a = seconds(second), seconds(first)
        else:
            a, b = seconds(first), seconds(second)
        pairs.append((a, b))
    lower, ratio, upper = statistics.quantiles((b / a for a, b in pairs), n=4)
    return InTurn(statistics.median(a for a, _ in pairs), statistics.median(b for _, b in pairs), ratio, lower, upper)


def prepare_times(names: list[str], rounds: int) -> None:
    for name in names:
        taken = []
        for _ in range(rounds):
            model = timm.create_model(name)
            taken.append(seconds(lambda model=model: autogate.prepare(model)))
        nodes = len(list(model.modules()))
        median = statistics.median(taken)
        print(f"prepare {name}: {median:.2f} s (first {taken[0]:.2f} s), {1000 * median / nodes:.2f} ms per module")


def training_step(model: nn.Module, batch: int, size: int) -> Callable[[], None]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    images = torch.randn(batch, 3, size, size, device=DEVICE)
    labels = torch.randint(1000, (batch,), device=DEVICE)
    model.train()

    def step() -> None:
        with torch.autocast(DEVICE, torch.bfloat16, enabled=DEVICE == "cuda"):
            loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def resnet50(gated: bool) -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model("resnet50").to(DEVICE)
    return autogate.prepare(model, flops=0.5, steps=1000) if gated else model


def gates_times(steps: int) -> tuple[float, float]:
    """Seconds of a step of a resnet50's gates alone, while they learn and after they have settled."""
    model = timm.create_model("resnet50").to(DEVICE)
    bank = autogate.gates(autogate.prepare(model, flops=0.5, steps=steps))
    for parameter in model.parameters():
        parameter.grad = 1e-3 * torch.randn_like(parameter)

    def step() -> None:
        bank.measure()
        bank.step(0.01)

    learning, still = [], []
    for _ in range(steps):
        (still if bank.stands_still else learning).append(seconds(step))
    return statistics.median(learning), statistics.median(still)


class MLPBlock(nn.Module):
    """Adds a multilayer perceptron's output to its input."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.outer(self.inner(x).relu())


def cpu_seconds(run: Callable[[], object], rounds: int) -> float:
    """The least processor time of several runs: other work on the machine makes a run longer, never shorter."""

    def once() -> float:
        start = time.process_time()
        run()
        return time.process_time() - start

    return min(once() for _ in range(rounds))


def by_depth(blocks: list[int], rounds: int) -> None:
    """Processor time of prepare for more and more residual blocks."""
    for count in blocks:
        model = nn.Sequential(nn.Linear(8, 16), *(MLPBlock(16, 16) for _ in range(count)), nn.Linear(16, 4))
        taken = cpu_seconds(lambda m=model: autogate.prepare(copy.deepcopy(m), torch.randn(2, 8)), rounds)
        print(f"prepare, {count} residual blocks: {taken:.2f} s, {1000 * taken / count:.2f} ms per block")


def by_classes(counts: list[int], rounds: int) -> None:
    """Processor time of prepare and of the gates' step for one wide layer."""
    for count in counts:
        model = nn.Sequential(nn.Linear(8, count), nn.ReLU(), nn.Linear(count, 4))
        taken = cpu_seconds(lambda m=model: autogate.prepare(copy.deepcopy(m), torch.randn(2, 8)), rounds)
        step = cpu_seconds(own_step(autogate.prepare(model, torch.randn(2, 8), steps=1000)), 10)
        print(f"{count:,} classes: prepare {taken:.2f} s, the gates' step {1000 * step:.0f} ms")


def own_step(model: nn.Module) -> Callable[[], None]:
    """The gates' part of an optimizer's step, while they learn."""
    for parameter in model.parameters():
        parameter.grad = 1e-3 * torch.randn_like(parameter)

    def step() -> None:
        bank = autogate.gates(model)  # it doesn't keep the model alive
        bank.measure()
        bank.step(1e-3)

    return step


def by_kernels(sizes: list[tuple[int, int]], rounds: int) -> None:
    """Processor time of an optimizer's step, plain and gated, for so many layers of this width."""

    def layers(count: int, width: int, gated: bool) -> nn.Module:
        model = nn.Sequential(*(layer for _ in range(count) for layer in (nn.Linear(width, width), nn.ReLU())))
        return autogate.prepare(model, torch.randn(2, width), flops=0.5, steps=1000) if gated else model

    for count, width in sizes:
        models = [layers(count, width, gated) for gated in (False, True)]
        optimizers = [torch.optim.SGD(model.parameters(), lr=1e-3) for model in models]
        for parameter in (parameter for model in models for parameter in model.parameters()):
            parameter.grad = 1e-3 * torch.randn_like(parameter)
        plain, gated = (cpu_seconds(optimizer.step, rounds) for optimizer in optimizers)
        print(f"optimizer step, {count} layers of {width}: {1000 * plain:.1f} ms plain, {1000 * gated:.1f} ms gated")
    for name in ("resnet50", "efficientnet_b5"):
        step = cpu_seconds(own_step(autogate.prepare(timm.create_model(name), steps=1000)), rounds)
        print(f"the gates' step, {name}: {1000 * step:.0f} ms")


def beside_peer(names: list[str], rounds: int) -> None:
    """Processor time of prepare, and of Torch-Pruning's graph and step, for the same inputs, on one thread.

    The two take turns, after a run of each on another model: the first imports and compiles.
    """
    torch.set_num_threads(1)
    for name in ["test_resnet", *names]:
        own, theirs = [], []
        for _ in range(rounds if name in names else 1):
            model, image = timm.create_model(name), torch.randn(2, 3, 224, 224)
            own.append(cpu_seconds(lambda m=model, x=image: autogate.prepare(m, x), 1))
            model = timm.create_model(name)
            found = torch_pruning(model, as_call(image, model))
            theirs.append(found["seconds"])
        if name in names:
            failed = f" ({found['error']})" if found["error"] else ""
            ratio = min(own) / min(theirs)
            print(f"prepare {name}: {min(own):.3f} s, Torch-Pruning {min(theirs):.3f} s{failed}, ratio {ratio:.2f}")


PEER_MODELS = [
    "repghostnet_050", "repghostnet_150", "mnasnet_050", "mobilenetv2_075", "lcnet_075", "efficientnet_b0_g8_gn",
    "eca_resnext26ts", "tf_efficientnet_lite0", "resnet50",
]  # fmt: skip


def scaling(rounds: int) -> None:
    by_depth([50, 100, 200, 400, 800], 2)
    by_classes([10**5, 10**6], 2)
    by_kernels([(300, 20), (1000, 100)], rounds)


def _peak(gated: bool, batch: int, size: int, answer) -> None:
    step = training_step(resnet50(gated), batch, size)
    for _ in range(3):
        step()
    if DEVICE == "cuda":
        answer.put(torch.cuda.max_memory_allocated())
    else:
        answer.put(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


def peak_memory(gated: bool, batch: int, size: int) -> float:
    """Peak bytes of a process that takes three steps."""
    context = multiprocessing.get_context("spawn")
    answer = context.Queue()
    process = context.Process(target=_peak, args=(gated, batch, size, answer))
    process.start()
    peak = answer.get()
    process.join()
    return peak


def half_resnet50(gated: bool) -> nn.Module:
    """A resnet50 with three tenths of its classes dead and half of its FLOPs left: with gates, or slim."""
    model = resnet50(gated=True)
    bank = autogate.gates(model)
    with torch.no_grad():
        bank.alpha[torch.rand(len(bank.alpha), generator=torch.Generator().manual_seed(0)) < 0.3] = 0
    return model if gated else autogate.finalize(model, warn=False)


def built_by_hand(slim: nn.Module) -> nn.Module:
    """A resnet50 built with the widths of the slim one."""
    model = timm.create_model("resnet50").to(DEVICE)
    for path, module in slim.named_modules():
        parent, _, name = path.rpartition(".")
        if isinstance(module, nn.Conv2d):
            made = nn.Conv2d(
                module.in_channels, module.out_channels, module.kernel_size, module.stride, module.padding, bias=False
            )
        elif isinstance(module, nn.BatchNorm2d):
            made = nn.BatchNorm2d(module.num_features)
        elif isinstance(module, nn.Linear):
            made = nn.Linear(module.in_features, module.out_features)
        else:
            continue
        setattr(model.get_submodule(parent), name, made.to(DEVICE))
    model.load_state_dict(slim.state_dict())
    return model


@torch.no_grad()
def latency(rounds: int) -> None:
    slim = half_resnet50(gated=False).eval()
    by_hand = built_by_hand(slim).eval()
    image: Tensor = torch.randn(1, 3, 224, 224, device=DEVICE)
    found = in_turn(lambda: by_hand(image), lambda: slim(image), rounds)
    print(f"latency of a slim resnet50: {found.second * 1e3:.1f} ms; by hand: {found.first * 1e3:.1f} ms; {found}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--batch", type=int, default=64 if DEVICE == "cuda" else 32)
    parser.add_argument("--size", type=int, default=224 if DEVICE == "cuda" else 160)
    parser.add_argument("--scaling", action="store_true")
    parser.add_argument("--peer", action="store_true")
    args = parser.parse_args()
    if args.peer:
        return beside_peer(PEER_MODELS, args.rounds)
    scaling(args.rounds)
    if args.scaling:
        return
    prepare_times(["resnet18", "resnet50", "resnet101", "resnet152", "densenet161"], 3)
    found = in_turn(
        training_step(resnet50(False), args.batch, args.size),
        training_step(resnet50(True), args.batch, args.size),
        args.rounds,
    )
    print(f"training step, resnet50: {found.first:.3f} s plain, {found.second:.3f} s gated; {found}")
    found = in_turn(
        training_step(half_resnet50(True), args.batch, args.size),
        training_step(half_resnet50(False), args.batch, args.size),
        args.rounds,
    )
    print(f"half of its FLOPs left: {found.first:.3f} s gated, {found.second:.3f} s finalized; {found}")
    learning, still = gates_times(3 * args.rounds)
    print(f"of which the gates: {learning * 1e3:.0f} ms while they learn, {still * 1e3:.0f} ms afterwards")
    plain, gated = (peak_memory(gated, args.batch, args.size) for gated in (False, True))
    print(f"peak memory: {plain / 1e6:.0f} MB plain, {gated / 1e6:.0f} MB gated; ratio {gated / plain:.3f}")
    latency(5 * args.rounds)


if __name__ == "__main__":
    main()
