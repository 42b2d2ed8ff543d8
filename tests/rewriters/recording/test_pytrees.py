"""Leaves are those that torch's pytree finds."""

from __future__ import annotations

from collections import OrderedDict, deque, namedtuple

import pytest
import torch
from torch.fx.immutable_collections import immutable_dict, immutable_list
from torch.utils._pytree import tree_leaves

from rewriters.recording.pytrees import leaves_of, tensors_of

Pair = namedtuple("Pair", "first second")
X, Y = torch.zeros(1), torch.nn.Parameter(torch.zeros(2))


@pytest.mark.parametrize(
    "value",
    [
        X, Y, None, 1, 0.5, True, "text", slice(1, 2), torch.float32, X.shape, (), [], {}, {1},
        (X, [Y, None], {"b": X, "a": (1, Y)}), Pair(X, [Y]), [Pair(1, X), deque([Y, 2])], OrderedDict(b=X, a=[Y]),
        immutable_list([X, (Y, 1)]), immutable_dict(b=X, a=Y), (immutable_list([X]), X.shape, slice(0, 1)),
    ],
    ids=str,
)  # fmt: skip
def test_leaves_are_those_that_pytree_finds(value):
    wanted = tree_leaves(value)
    assert [id(leaf) for leaf in leaves_of(value)] == [id(leaf) for leaf in wanted]
    assert [id(one) for one in tensors_of(value)] == [id(leaf) for leaf in wanted if isinstance(leaf, torch.Tensor)]
