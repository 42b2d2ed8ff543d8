"""Whether a latency budget holds: the share that the table of timings predicts, and the slim model's measured share.

    python -m benchmarks.latency --models resnet18 mobilenetv2_100 --target 0.6

Gates are moved down to the budget without training (only alpha moves, by price), the model is finalized, and the dense
and the slim model run in turn. The table is measured again in every run.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import time
from unittest import mock

import timm
import torch

import autogate
from benchmarks.cost import DEVICE, in_turn


def go_down(bank: autogate.GateBank, steps: int) -> None:
    """Move alpha by price alone until the target is met, with a little noise to separate classes of equal price."""
    gates = bank.learner.start()
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        noise = 300 * torch.randn(len(gates.alpha), generator=generator)
        gates = bank.learner.step(gates, noise * gates.live, 0.1)
    with torch.no_grad():
        bank.alpha[~gates.live.to(bank.alpha.device)] = 0
    bank.fold()


def measure(name: str, args: argparse.Namespace) -> str:
    torch.manual_seed(0)
    dense = timm.create_model(name).eval().to(DEVICE)
    image = torch.randn(2, 3, args.size, args.size, device=DEVICE)
    slim = copy.deepcopy(dense)
    with tempfile.TemporaryDirectory() as folder, mock.patch.dict("os.environ", {"AUTOGATE_CACHE": folder}):
        started = time.perf_counter()
        autogate.prepare(slim, image, latency=args.target, steps=300)
        measuring = time.perf_counter() - started
    bank = autogate.gates(slim)
    go_down(bank, 300)
    (share,) = bank.shares().values()
    summary = autogate.summary(slim)
    slim = autogate.finalize(slim, warn=False)
    with torch.no_grad():
        taken = in_turn(lambda: dense(image[:1]), lambda: slim(image[:1]), args.rounds)
    return (
        f"{name}: target {args.target}, by the table {share:.3f}, measured {taken}; "
        f"FLOPs left {summary.flops / summary.all_flops:.3f}; prepare with timings {measuring:.0f} s"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["resnet18", "mobilenetv2_100", "densenet121"])
    parser.add_argument("--target", type=float, default=0.6)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    for name in args.models:
        print(measure(name, args), flush=True)


if __name__ == "__main__":
    main()
