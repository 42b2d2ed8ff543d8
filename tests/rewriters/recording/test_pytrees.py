"""Leaves are those that torch's pytree finds; tensors are found in objects too."""

from __future__ import annotations

from collections import OrderedDict, deque, namedtuple

import pytest
import torch
from torch.fx.immutable_collections import immutable_dict, immutable_list
from torch.utils._pytree import tree_leaves

from rewriters.recording.pytrees import leaves_of, map_tensors, tensors_of

Pair = namedtuple("Pair", "first second")
X, Y = torch.zeros(1), torch.nn.Parameter(torch.zeros(2))


class Holder:
    """Holds tensors in a dictionary and in a slot, and itself."""

    __slots__ = ("__dict__", "slot")

    def __init__(self, first: torch.Tensor, second: torch.Tensor):
        self.slot, self.fields, self.itself, self.layer = first, [{"b": second}], self, torch.nn.Linear(1, 1)


class Dictionary(dict):
    """Is its own dictionary of attributes."""

    def __init__(self, *args: object, **kwargs: object):
        super().__init__(*args, **kwargs)
        self.__dict__ = self


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
    tensors = [leaf for leaf in wanted if isinstance(leaf, torch.Tensor)]
    assert [id(one) for one in tensors_of(value)] == list(map(id, tensors))


def test_tensors_are_found_and_changed_in_objects():
    """A module that an object holds isn't opened."""
    value = {"a": Holder(X, Y), "b": (1, {X})}
    assert [id(one) for one in tensors_of(value)] == [id(X), id(Y), id(X)]
    changed = map_tensors(lambda tensor: tensor + 1, value)
    assert torch.equal(changed["a"].slot, X + 1) and torch.equal(changed["a"].fields[0]["b"], Y + 1)
    assert changed["b"][0] == 1 and type(changed["b"][1]) is set
    assert value["a"].slot is X and changed["a"].layer is value["a"].layer


def test_a_dictionary_that_is_its_own_attributes_is_made_anew():
    changed = map_tensors(lambda tensor: tensor + 1, Dictionary(a=X))
    assert type(changed) is Dictionary and torch.equal(changed.a, X + 1)
