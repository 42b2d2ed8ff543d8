"""What planning reads from a model's weights, besides the labels and the live classes.

A plan follows from the model's structure, except for two questions that only the weights answer: is a value the same at
every position, so that a constant can replace it, and does a 1x1 kernel only pass channels on? With the answers noted,
the same plan can be made for a model without its weights. `plan` and `restore` take them instead of the weights, and
constants are zero until their tensors are loaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Decisions:
    """The answers that a plan was made with.

    Attributes:
        branches: by the path of each module from which branches were removed: for each value at which such a branch
            meets the rest, in the order in which they run, whether a constant replaces it.
        selections: by the path of each 1x1 convolution on a shortcut that only passes channels on: for each output that
            stays the input that it equals, or the number of inputs if it is zero.
    """

    branches: Mapping[str, tuple[bool, ...]] = field(default_factory=dict)
    selections: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
