"""Draws channel labels through a residual block, as rewriters finds them: python docs/figures/labels.py

Nothing in the picture is written by hand: colours are the labels of a real analysis, the dead channels those of a real
plan. A test draws it anew and compares.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

import rewriters
from rewriters.labelling.labels import Labelled

FILE = Path(__file__).with_suffix(".svg")
DEAD = [1, 4, 7]
"""Classes that die in the last row: two of the stage's, one from inside the block."""

CELL, GAP, TOP, ROW = 16, 30, 64, 214
HUES = {"stem.weight[0]": 212, "block.conv1.weight[0]": 28}
"""Of the sides whose labels are left after merging; the others' hues are spread over the circle."""


class Block(nn.Module):
    """Two convolutions and an identity shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(6, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.conv2, self.norm2 = nn.Conv2d(4, 6, 3, padding=1), nn.BatchNorm2d(6)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.norm2(self.conv2(torch.relu(self.norm1(self.conv1(x))))))


class Net(nn.Module):
    """The block with a convolution before it and one behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.block, self.head = nn.Conv2d(3, 6, 1), Block(), nn.Conv2d(6, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(self.stem(x)))


@dataclass(frozen=True)
class Part:
    """A thing in the picture: rows of labels, and columns where it is a kernel.

    Attributes:
        name: under the picture.
        rows: labels from top to bottom: channels of an activation, output channels of a kernel, a norm's vector.
        columns: input channels of a kernel.
        gated: gates stand on the columns.
    """

    name: str
    rows: Sequence[int]
    columns: Sequence[int] = ()
    gated: bool = False

    @property
    def width(self) -> int:
        return CELL * (1 + len(self.columns))


@dataclass
class Drawing:
    """The labels of a small residual network and the marks they are drawn with."""

    analysis: rewriters.Analysis
    plan: rewriters.SlimPlan
    lines: list[str] = field(default_factory=list)

    def parts(self) -> list[Part]:
        return [
            self._kernel("stem.weight"), self._activation("stem", "x"), self._kernel("block.conv1.weight"),
            self._vector("block.norm1.weight", "norm"), self._activation("block.norm1", "h"),
            self._kernel("block.conv2.weight"), self._vector("block.norm2.weight", "norm"),
            self._activation("block.norm2", "f(x)"), self._activation("block", "x + f(x)"),
            self._kernel("head.weight"),
        ]  # fmt: skip

    def _own(self, tensor: str, dim: int) -> list[int]:
        start, size = self.analysis.labelling.space.blocks[rewriters.Side(tensor, dim)]
        return list(range(start, start + size))

    def _kernel(self, name: str) -> Part:
        gated = rewriters.Side(name, 1) in self.analysis.channel_map.gated
        return Part(name.split(".")[-2], self._own(name, 0), self._own(name, 1), gated)

    def _vector(self, name: str, title: str) -> Part:
        return Part(title, self._own(name, 0))

    def _activation(self, module: str, title: str) -> Part:
        """Labels of the last tensor with channels that is computed in a module."""
        nodes = [
            n for n in self.analysis.captures[0].graph.nodes if (call := n.meta.get("call")) and call.path == module
        ]
        values = [self.analysis.labelling.values[node] for node in nodes]
        labels = [value.layer(1) for value in values if isinstance(value, Labelled) and value.ndim == 4]
        return Part(title, [layer for layer in labels if layer is not None][-1].flatten().tolist())

    def colour(self, label: int) -> str:
        """One hue for each side that owns labels, one shade for each of its indices."""
        sides = list(self.analysis.labelling.space.blocks.items())
        place, (side, (start, size)) = next(
            (at, item) for at, item in enumerate(sides) if item[1][0] <= label < sum(item[1])
        )
        hue = HUES.get(str(side), (place * 137) % 360)
        shade = 45 + 35 * (label - start) / max(1, size - 1)
        return f"hsl({hue}, {70 if str(side) in HUES else 35}%, {shade:.0f}%)"

    def merged(self, label: int) -> str:
        """The colour of the label that it was merged into; grey where that is pinned."""
        root = int(self.analysis.labelling.space.roots()[label])
        return "hsl(0, 0%, 75%)" if self.analysis.labelling.space.pinned_roots()[root] else self.colour(root)

    def left(self, label: int) -> str | None:
        """As `merged`; None where the class dies."""
        number = int(self.analysis.labelling.class_of_label()[label])
        return self.merged(label) if number == rewriters.ALWAYS or bool(self.plan.live[number]) else None

    def row(self, top: int, title: str, text: str, paint: Callable[[int], str | None], gates: bool = True) -> None:
        self.lines.append(f'<text x="24" y="{top}" class="title">{title}</text>')
        self.lines.append(f'<text x="24" y="{top + 17}" class="text">{text}</text>')
        left, centre = 36, top + 110
        anchors: dict[str, int] = {}
        parts = self.parts()
        for part in parts:
            self._part(part, left, centre, paint, gates)
            anchors.setdefault(part.name, left + part.width // 2)
            following = left + part.width
            if part is not parts[-1]:
                self._arrow(following + 5, centre, following + GAP - 5)
            left = following + GAP
        self._shortcut(anchors["x"], anchors["x + f(x)"], centre)

    def _part(self, part: Part, left: int, centre: int, paint: Callable[[int], str | None], gates: bool) -> None:
        top = centre - CELL * len(part.rows) // 2
        for at, label in enumerate(part.rows):
            self._cell(left, top + at * CELL, paint(label))
        for at, label in enumerate(part.columns):
            self._cell(left + CELL * (at + 1), top - CELL, paint(label))
            for below, other in enumerate(part.rows):
                alive = paint(label) and paint(other)
                self._cell(left + CELL * (at + 1), top + below * CELL, "hsl(0, 0%, 93%)" if alive else None)
            if gates and part.gated and paint(label):
                x, y = left + CELL * (at + 1) + CELL // 2, top - CELL - 6
                self.lines.append(f'<circle cx="{x}" cy="{y}" r="2.5" class="gate"/>')
        y = centre + CELL * 3 + 18
        self.lines.append(f'<text x="{left + part.width / 2:.0f}" y="{y}" class="name">{part.name}</text>')

    def _cell(self, x: int, y: int, fill: str | None) -> None:
        style = f'fill="{fill}"' if fill else 'class="dead"'
        self.lines.append(f'<rect x="{x + 1}" y="{y + 1}" width="{CELL - 2}" height="{CELL - 2}" rx="2" {style}/>')

    def _arrow(self, x: int, y: int, to: int) -> None:
        self.lines.append(f'<path d="M{x} {y} H{to} m-4 -3 l4 3 l-4 3" class="line"/>')

    def _shortcut(self, start: int, end: int, centre: int) -> None:
        """From x over all that is between to the sum."""
        low, high = centre - CELL * 3 - 4, centre - CELL * 3 - 34
        path = f"M{start} {low} V{high} H{end} V{low} m-3 -4 l3 4 l3 -4"
        self.lines.append(f'<path d="{path}" class="line"/>')


def draw() -> str:
    """The picture as SVG."""
    model, example = Net().eval(), torch.zeros(2, 3, 8, 8)
    analysis = rewriters.analyse(model, (example,))
    live = torch.ones(analysis.channel_map.size, dtype=torch.bool)
    live[DEAD] = False
    drawing = Drawing(analysis, rewriters.plan(model, analysis, live, (example,)))
    drawing.row(
        TOP - 30, "1. Every index owns a label",
        "Each row and column of a kernel, each entry of a norm. Labels go with what is computed from them.",
        drawing.colour, gates=False,
    )  # fmt: skip
    drawing.row(
        TOP - 30 + ROW, "2. Labels that meet are merged",
        "The add lets x and f(x) meet: six classes for the stage, four inside the block. Grey: pinned. Dots: gates.",
        drawing.merged,
    )  # fmt: skip
    drawing.row(
        TOP - 30 + 2 * ROW, "3. A class dies everywhere at once",
        f"{len(DEAD)} gates at zero: their rows and columns go out of all kernels and norms; outputs stay the same.",
        drawing.left,
    )  # fmt: skip
    width = 36 * 2 + sum(part.width + GAP for part in drawing.parts()) - GAP
    height = TOP - 30 + 3 * ROW - 10
    style = (
        "text{font-family:sans-serif;fill:#222}.title{font-size:15px;font-weight:bold}.text{font-size:12px}"
        ".name{font-size:11px;text-anchor:middle}.line{fill:none;stroke:#666;stroke-width:1.2}.gate{fill:#c2185b}"
        ".dead{fill:none;stroke:#bbb;stroke-dasharray:2 2}"
    )
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'role="img">\n<title>Channel labels through a residual block</title>\n'
        f"<style>{style}</style>\n"
        f'<rect width="{width}" height="{height}" rx="6" fill="#fff"/>'
    )
    return "\n".join([head, *drawing.lines, "</svg>\n"])


if __name__ == "__main__":
    FILE.write_text(draw())
