"""Draws which part of each kernel the subnets of a small network have: python docs/figures/subnets.py

The subnets are real ones, found by L1 norms and fused; nothing in the picture is written by hand. A test draws it anew
and compares.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from autogate import subnets

FILE = Path(__file__).with_suffix(".svg")
SHARES = (0.2, 0.5)
COLOURS = ("#1d4e79", "#74a9d4", "#dce8f2")
"""Of the cells of the smallest subnet, of those that the next one adds, and of those that the whole network adds."""

CELL, GAP, LEFT, TOP, ROW = 15, 44, 30, 34, 218


class Net(nn.Module):
    """A residual block with a convolution before it and one behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv1, self.conv2 = nn.Conv2d(3, 9, 1), nn.Conv2d(9, 6, 3, padding=1), nn.Conv2d(6, 9, 1)
        self.head = nn.Conv2d(9, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(torch.relu(x + self.conv2(torch.relu(self.conv1(x)))))


KERNELS = ("stem", "conv1", "conv2", "head")


def owners(kernel: Tensor, name: str, structures: Sequence[subnets.Structure]) -> Tensor:
    """The number of the smallest subnet that has each cell of a kernel, int64, shape (outputs, inputs)."""
    owner = torch.full(kernel.shape[:2], len(structures))
    for number, structure in reversed(list(enumerate(structures))):
        has = torch.ones(kernel.shape[:2], dtype=torch.bool)
        for one in structure.kept:
            stays = torch.zeros(one.size, dtype=torch.bool)
            stays[list(one.kept)] = True
            for dim, along in enumerate((stays[:, None], stays)):
                if (f"{name}.weight", dim) in one.sides:
                    has &= along
        owner[has] = number
    return owner


def row(model: Net, top: int, title: str, text: str) -> list[str]:
    """The kernels of a switchable model, from left to right."""
    structures = [one.structure for one in subnets.status(model).rows[:-1]]
    lines = [f'<text x="{LEFT}" y="{top}" class="title">{title}</text>']
    lines.append(f'<text x="{LEFT}" y="{top + 17}" class="text">{text}</text>')
    left = LEFT
    for name in KERNELS:
        owner = owners(getattr(model, name).weight, name, structures)
        outputs, inputs = owner.shape
        for at in range(outputs):
            for to in range(inputs):
                x, y = left + to * CELL, top + 34 + at * CELL
                fill = COLOURS[int(owner[at, to])]
                lines.append(f'<rect x="{x}" y="{y}" width="{CELL - 1}" height="{CELL - 1}" fill="{fill}"/>')
        lines.append(f'<text x="{left}" y="{top + 34 + outputs * CELL + 14}" class="name">{name}</text>')
        left += inputs * CELL + GAP
    return lines


def draw() -> str:
    """The picture as SVG."""
    torch.manual_seed(0)
    dense, example = Net(), torch.zeros(2, 3, 8, 8)
    found = subnets.find(dense, example, flops=SHARES, by="l1")
    ordered = Net()
    ordered.load_state_dict(dense.state_dict())
    lines = row(
        subnets.fuse(dense, found), TOP, "One set of kernels, three networks",
        "Rows are output channels, columns input channels. The add couples the rows of stem and conv2.",
    )  # fmt: skip
    lines += row(
        subnets.fuse(ordered, found, nested=True), TOP + ROW, "The same with nested=True",
        "Channels in another order: each subnet has the first ones, so its slices are views of the kernels.",
    )  # fmt: skip
    foot, left = TOP + 2 * ROW - 12, LEFT
    names = [f"subnet of {share:.0%} of the FLOPs" for share in SHARES]
    for colour, words in zip(COLOURS, [names[0], f"what the {names[1]} adds", "what the whole adds"], strict=True):
        lines.append(f'<rect x="{left}" y="{foot - 11}" width="{CELL - 1}" height="{CELL - 1}" fill="{colour}"/>')
        lines.append(f'<text x="{left + CELL + 5}" y="{foot}" class="name">{words}</text>')
        left += CELL + 24 + 6 * len(words)
    width, height = 660, foot + 18
    style = (
        "text{font-family:sans-serif;fill:#222}.title{font-size:15px;font-weight:bold}.text{font-size:12px}"
        ".name{font-size:11px}"
    )
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'role="img">\n<title>How the subnets of a small network share its kernels</title>\n'
        f'<style>{style}</style>\n<rect width="{width}" height="{height}" rx="6" fill="#fff"/>'
    )
    return "\n".join([head, *lines, "</svg>\n"])


if __name__ == "__main__":
    FILE.write_text(draw())
