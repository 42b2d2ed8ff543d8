"""Tensors in what calls are given and give: in one by itself, or anywhere in tuples, lists and dicts."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves


def tensors_of(value: Any) -> list[Tensor]:
    """All tensors in a value, in order."""
    if isinstance(value, Tensor):  # as it mostly is
        return [value]
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
