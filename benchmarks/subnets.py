"""What several widths in one network cost: a training step, latency, switching, memory.

    python -m benchmarks.subnets [--model resnet50 --batch 16 --size 160 --rounds 5 --nested]

A switchable network with subnets of 5, 22, 45 and 100 % of the FLOPs (channels by L1 norm, the same part of every
layer) beside the four networks that `subnets.extract` makes of it. Times are medians of runs that take turns.
"""

from __future__ import annotations

import argparse
import copy
import statistics

import timm
import torch
import torch.nn.functional as F
from torch import nn

from autogate import subnets
from benchmarks.cost import in_turn, seconds

SHARES = (0.05, 0.22, 0.45)


def switchable(name: str, nested: bool) -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model(name)
    found = subnets.find(model, flops=SHARES, by="l1", allocation="uniform")
    return subnets.fuse(model, found, nested=nested)


def training(model: nn.Module, alone: list[nn.Module], batch: int, size: int, rounds: int) -> None:
    """A step over all subnets, and a step of each network by itself."""
    images, labels = torch.randn(batch, 3, size, size), torch.randint(1000, (batch,))

    def loss_of(one: nn.Module) -> None:
        F.cross_entropy(one(images), labels).backward()

    def stepper(one: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(one.train().parameters(), lr=0.01, momentum=0.9)

    together = stepper(model)
    apart = [(one, stepper(one)) for one in alone]

    def step_together() -> None:
        together.zero_grad()
        for _ in subnets.each(model):
            loss_of(model)
        together.step()

    def steps_apart() -> None:
        for one, optimizer in apart:
            optimizer.zero_grad()
            loss_of(one)
            optimizer.step()

    taken = in_turn(steps_apart, step_together, rounds)
    print(f"training step over {len(alone)} subnets, over the sum of their networks' own: {taken}")


@torch.no_grad()
def latencies(model: nn.Module, alone: list[nn.Module], size: int, rounds: int) -> None:
    """The active subnet beside the network that was taken out."""
    image = torch.randn(1, 3, size, size)
    for number, one in enumerate(alone):
        subnets.switch(model.eval(), number)
        taken = in_turn(lambda one=one: one(image), lambda: model(image), rounds)
        print(f"latency of subnet {number} in the switchable network over the extracted one: {taken}")


@torch.no_grad()
def switching(model: nn.Module, rounds: int) -> None:
    """Time of a switch, to a subnet whose slices are kept and to one whose slices aren't."""
    new, kept = [], []
    for _ in range(rounds):
        for parameter in model.parameters():
            parameter.mul_(1.0)
        new += [seconds(lambda number=number: subnets.switch(model, number)) for number in range(3)]
        kept += [seconds(lambda number=number: subnets.switch(model, number)) for number in range(3)]
    print(f"switch to a new subnet: {1000 * statistics.median(new):.1f} ms, at most {1000 * max(new):.1f} ms")
    print(f"switch to a kept subnet: {1000 * statistics.median(kept):.2f} ms, at most {1000 * max(kept):.2f} ms")


def memory(model: nn.Module) -> None:
    """Bytes of the switchable network's tensors, relative to the dense one's."""
    dense = sum(tensor.nbytes for tensor in subnets.extract(model, "full").state_dict().values())
    rows = subnets.status(model).rows
    own, kept = sum(row.own_bytes for row in rows), sum(row.kept_bytes for row in rows)
    print(f"memory over the dense network's: own norms {own / dense:.3f}, kept slices {kept / dense:.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--size", type=int, default=160)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--nested", action="store_true", help="keep slices as views of the weights")
    options = parser.parse_args()
    model = switchable(options.model, options.nested).eval()
    print(subnets.status(model))
    alone = [subnets.extract(model, number) for number in range(len(SHARES) + 1)]
    switching(model, options.rounds)
    memory(model)
    latencies(model, [copy.deepcopy(one).eval() for one in alone], options.size, 5 * options.rounds)
    training(model, alone, options.batch, options.size, options.rounds)


if __name__ == "__main__":
    main()
