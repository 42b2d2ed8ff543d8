"""Time of models that choose their channels for each image, beside their FLOPs.

    python -m benchmarks.adaptive_time                        # ResNet-18 and ResNet-50, 224 pixels
    python -m benchmarks.adaptive_time resnet18 --rounds 50

Codes are drawn at random, and the threshold is set so that images take the wanted share of the FLOPs on average. Each
row is one batch size: with a code for each image, or with prototypes. Times are the least processor times of runs that
take turns with the dense model's; "of it" is the part of the FLOPs saved that is saved in time.
"""

from __future__ import annotations

import argparse
import copy
import time
from typing import NamedTuple

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autogate import adaptive
from autogate.saliency import SaliencyModule
from benchmarks.cost import DEVICE, synchronise


@torch.no_grad()
def draw_codes(model: nn.Module, images: Tensor, share: float, seed: int = 0) -> None:
    """Write weights into the saliency modules so that each has this share of its channels on, at random.

    Which channels these are hangs on the image. Scores stay near one in networks of any depth, on these images: others
    may have means far from theirs.
    """
    random = torch.Generator().manual_seed(seed)

    def draw(module: SaliencyModule, args: tuple[Tensor]) -> None:
        hidden = module.reduce(module.layout.means(args[0]).to(args[0])).relu().cpu().double()
        weight = torch.randn(module.expand.weight.shape, generator=random).double()
        spread = torch.maximum(((hidden - hidden.mean(0)) @ weight.T).std(), 0.3 * (hidden @ weight.T).std())
        weight *= 0.5 / spread.clamp(min=1e-3)
        bias = 0.2 * torch.randn(module.expand.bias.shape, generator=random) - weight @ hidden.mean(0)
        scores = hidden @ weight.T + bias
        module.expand.weight.copy_(weight / module.sharpness)
        module.expand.bias.copy_((bias - widest_gap(scores, 1 - share) - 1) / module.sharpness)

    handles = [module.register_forward_pre_hook(draw) for module in adaptive.bank(model).saliency_modules]
    model.eval()(images)
    for handle in handles:
        handle.remove()


def widest_gap(scores: Tensor, share: float) -> float:
    """A number above about this share of the scores, and far from all of them: rounding doesn't change which."""
    ordered = scores.flatten().sort().values
    middle, around = round(share * len(ordered)), max(1, len(ordered) // 50)
    near = ordered[max(0, middle - around) : middle + around]
    widest = int(near.diff().argmax())
    return float(near[widest : widest + 2].mean())


def noise(count: int, size: int, seed: int = 0) -> Tensor:
    """Images of noise, shape (count, 3, size, size), that differ in their colours and in what is where."""
    random = torch.Generator().manual_seed(seed)
    coarse = (torch.randn(count, 3, side, side, generator=random) for side in (1, 4, size))
    return sum(F.interpolate(one, size=(size, size), mode="nearest") for one in coarse)


class Row(NamedTuple):
    """One batch size of one model: shares of the dense model's FLOPs and time."""

    model: str
    form: str
    batch: int
    flops: float
    time: float

    def __str__(self) -> str:
        saved = (1 - self.time) / (1 - self.flops)
        return f"| {self.model} | {self.form} | {self.batch} | {self.flops:.3f} | {self.time:.3f} | {saved:.2f} |"


REDUCTION = 16.0
"""Of the saliency modules: as in squeeze-excite."""

HEADER = """| model | codes | batch | FLOPs | time | of it |
| --- | --- | ---: | ---: | ---: | ---: |"""


def rows(name: str, share: float, size: int, rounds: int, prototypes: int) -> list[Row]:
    """Time a model with drawn codes at batch sizes 1 and 64."""
    torch.manual_seed(0)
    dense = timm.create_model(name, num_classes=1000).to(DEVICE).eval()
    images = noise(8, size).to(DEVICE)
    model = adaptive.prepare(copy.deepcopy(dense), images[:2], flops=0.9, method=adaptive.SANP(reduction=REDUCTION))
    draw_codes(model, images, 0.55)
    adaptive.budget(model, flops=share, batches=[images])
    fast = adaptive.finalize(copy.deepcopy(model), warn=False)
    found = [timed(name, "its own", dense, fast, batch, size, rounds) for batch in (1, 64)]
    grouped = adaptive.finalize(model, batches=[images], prototypes=prototypes, warn=False)
    print(adaptive.grouping(grouped))
    return [*found, timed(name, "prototypes", dense, grouped, 64, size, rounds)]


@torch.inference_mode()
def timed(name: str, form: str, dense: nn.Module, fast: nn.Module, batch: int, size: int, rounds: int) -> Row:
    """Time both models on images of noise, in turns."""
    images = noise(batch, size, seed=1).to(DEVICE)
    least = [float("inf"), float("inf")]
    for _ in range(rounds if batch == 1 else max(2, rounds // 8)):
        for place, model in enumerate((dense, fast)):
            least[place] = min(least[place], seconds(model, images))
    cost = adaptive.cost(fast).mean() / adaptive.bank(fast).cost_of_images().dense
    return Row(name, form, batch, float(cost), least[1] / least[0])


def seconds(model: nn.Module, images: Tensor) -> float:
    """Processor time of a forward, or the time of a GPU."""
    clock = time.perf_counter if images.is_cuda else time.process_time
    synchronise()
    start = clock()
    model(images)
    synchronise()
    return clock() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=["resnet18", "resnet50"])
    parser.add_argument("--share", type=float, default=0.35, help="mean share of the FLOPs")
    parser.add_argument("--size", type=int, default=224, help="pixels")
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--prototypes", type=int, default=4)
    given = parser.parse_args()
    torch.set_num_threads(1)
    print(HEADER)
    for name in given.models:
        for row in rows(name, given.share, given.size, given.rounds, given.prototypes):
            print(row, flush=True)


if __name__ == "__main__":
    main()
