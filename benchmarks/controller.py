"""How closely budgets are met without tuning: over architectures, targets, optimizers and lengths of run.

    python -m benchmarks.controller trained --out runs/controller      # 300 steps on the digits, SGD and AdamW
    python -m benchmarks.controller simulated --out runs/controller    # 300 to 30,000 steps against a made-up loss
    python -m benchmarks.controller table --out runs/controller

Each run writes one line of JSON; runs that already have one are skipped.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from torch import nn

import autogate
from autogate import digits
from autogate.gating.bank import GateBank
from autogate.methods import GDP, Learner
from autogate.steering.groups import groups_of

ARCHITECTURES = {
    "resnet10t": {},
    "repvgg_a0": {},
    "mobilenetv2_035": {},
    "efficientnet_lite0": {},
    "regnetx_002": {},
    "ghostnet_050": {},
    "densenet121": {"growth_rate": 12, "block_config": (3, 6, 12, 8)},
    "dla46_c": {},
    "ese_vovnet19b_slim_dw": {},
    "convnext_atto": {},
    "vit_tiny_patch16_224": {"img_size": digits.SIZE, "patch_size": 4},
}
TARGETS = (0.7, 0.5, 0.3, 0.15)
OPTIMIZERS = {
    "SGD": lambda parameters: torch.optim.SGD(parameters, 0.02, momentum=0.9, weight_decay=1e-4),
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, 1e-3),
}
LENGTHS = (300, 3000, 30_000)
STRENGTH = 10.0
"""Of the made-up loss: dL/dg of the middle gate when it is nearly closed."""
BATCH = 8


def prepared(name: str, target: float, steps: int) -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10, in_chans=1, **ARCHITECTURES[name])
    return autogate.prepare(model, torch.zeros(2, 1, digits.SIZE, digits.SIZE), flops=target, steps=steps)


def least_width(bank: GateBank, live: torch.Tensor) -> float:
    """The smallest part of its channels that any layer has left on a side."""
    of = bank.channel_map
    sides = {side for kernel in of.kernels for side in (kernel.input_side, kernel.output_side)} & set(of.classes)
    return min(len(of.kept(side, live)) / of.sizes[side] for side in sides)


def measures(bank: GateBank, live: torch.Tensor, gates: torch.Tensor, met_at: int) -> dict:
    (share,) = bank.targets.shares(live).values()
    between = int(((gates > 0.01) & (gates < 0.5)).sum())
    return {"share": share, "met_at": met_at, "least_width": least_width(bank, live), "between": between}


def trained(name: str, target: float, optimizer_name: str, steps: int = 300) -> dict:
    """A training run from scratch on the digits."""
    model = prepared(name, target, steps)
    bank = autogate.gates(model)
    train, _ = digits.load()
    optimizer = OPTIMIZERS[optimizer_name](model.parameters())
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    met_at = 0
    for step in range(steps):
        index = torch.randint(len(train.labels), (BATCH,))
        loss = F.cross_entropy(model(train.images[index]), train.labels[index])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)  # without clipping some of them diverge, gated or not
        optimizer.step()
        schedule.step()
        met_at = met_at or (step + 1 if bank.settled or bank.targets.distance(bank.live) <= 0 else 0)
    return measures(bank, bank.live, bank.gates(), met_at)


def simulated(name: str, target: float, strength: float, steps: int) -> dict:
    """Train alpha alone, with a loss that holds each gate open with a different strength, and noise of that size."""
    bank = autogate.gates(prepared(name, target, steps))
    generator = torch.Generator().manual_seed(0)
    learner = Learner(GDP(), bank.targets, groups_of(bank.channel_map, 1), steps)
    gates = learner.start()
    strengths = strength * torch.exp(torch.randn(len(gates.alpha), generator=generator))
    standing, met_at = learner.standing(gates.live), 0
    for step in range(steps):
        noise = torch.randn(len(strengths), generator=generator)
        gradient = strengths * (learner.method.factor(gates.alpha, gates.state) - 1 + noise) * gates.live
        live = gates.live
        gates = learner.step(gates, gradient, 0.05 * (1 + math.cos(math.pi * step / steps)), standing)
        if not torch.equal(live, gates.live):
            standing = learner.standing(gates.live)
        met_at = met_at or (gates.count if gates.pressure.settled or standing.distance <= 0 else 0)
    return measures(bank, gates.live, learner.method.factor(gates.alpha, gates.state), met_at)


def runs(kind: str, names: Iterable[str]) -> Iterator[tuple]:
    """The runs: architecture, target, optimizer or strength, steps."""
    for name in names:
        for target in TARGETS:
            if kind == "trained":
                yield from ((name, target, optimizer, 300) for optimizer in OPTIMIZERS)
            else:
                yield from ((name, target, STRENGTH, steps) for steps in LENGTHS)


def done(path: Path) -> dict[tuple, dict]:
    if not path.exists():
        return {}
    lines = map(json.loads, path.read_text().splitlines())
    return {tuple(line["run"]): line for line in lines}


def table(out: Path) -> None:
    for kind in ("trained", "simulated"):
        found = done(out / f"{kind}.jsonl")
        if not found:
            continue
        print(f"\n{kind}: {len(found)} runs\n")
        print("| architecture | " + " | ".join(f"FLOPs {target}" for target in TARGETS) + " | least width |")
        print("|---|" + "---|" * (len(TARGETS) + 1))
        for name in ARCHITECTURES:
            of_name = [line for run, line in found.items() if run[0] == name and "error" not in line]
            cells = []
            for target in TARGETS:
                shares = [line["share"] for line in of_name if line["run"][1] == target]
                cells.append(f"{min(shares):.3f} to {max(shares):.3f}" if shares else "out of reach")
            widths = [line["least_width"] for line in of_name]
            print(f"| {name} | " + " | ".join(cells) + f" | {min(widths, default=0):.3f} |")
        lines = [line for line in found.values() if "error" not in line]
        gaps = [line["share"] - line["run"][1] for line in lines]
        latest = max(line["met_at"] / line["run"][3] for line in lines)
        print(f"\nshare minus target: {min(gaps):+.4f} to {max(gaps):+.4f}; met at {latest:.2f} of the steps at the "
              f"latest; gates between 0.01 and 0.5 at the end: {sum(line['between'] for line in lines)}")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=["trained", "simulated", "table"])
    parser.add_argument("--out", type=Path, default=Path("runs/controller"))
    parser.add_argument("--models", nargs="+", default=list(ARCHITECTURES), choices=list(ARCHITECTURES))
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.kind == "table":
        return table(args.out)
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"{args.kind}.jsonl"
    for run in runs(args.kind, args.models):
        if run in done(path):
            continue
        started = time.time()
        try:
            result = (trained if args.kind == "trained" else simulated)(*run)
        except autogate.AutogateError as error:
            result = {"error": str(error)}
        line = {"run": run, **result, "seconds": round(time.time() - started, 1)}
        with path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
