"""What planning a slimming reads off a model's weights, apart from the labels and the classes that live.

A plan follows from the model's structure, but for two questions that only the weights answer: is a value the
same at every position, so that a constant can stand for it, and does a 1x1 kernel only hand channels on. With
the answers noted the plan can be made again for a model whose weights are not there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Decisions:
    """Answers that a plan was made with.

    Attributes:
        branches: by the path of each module that branches were taken out of: for each value at which such a
            branch meets the rest, in the order they run, whether a constant stands for it.
        selections: by the path of each 1x1 convolution on a shortcut that only hands channels on: for each
            output that stays the input it is, or the number of inputs where it is zero.
    """

    branches: Mapping[str, tuple[bool, ...]] = field(default_factory=dict)
    selections: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
