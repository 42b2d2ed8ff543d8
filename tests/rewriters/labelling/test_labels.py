"""Labels: connected components, and layers of labels that stay small."""

import itertools
from math import prod

import networkx as nx
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rewriters.labelling import labels as labels_module
from rewriters.labelling.channel_map import Side
from rewriters.labelling.labels import LabelSpace, compress, give_members, picked, reshaped, varying


@st.composite
def graphs(draw):
    count = draw(st.integers(1, 60))
    edges = draw(st.lists(st.tuples(st.integers(0, count - 1), st.integers(0, count - 1)), max_size=90))
    return count, edges


def joined(count: int, first: np.ndarray, second: np.ndarray, apart: int = 1) -> np.ndarray:
    """Roots of labels merged along these edges, every so many of which are merged, and looked at, by themselves."""
    space = LabelSpace()
    space.fresh(count)
    for part in range(apart):
        space.merge(*(torch.from_numpy(ends[part::apart].copy()) for ends in (first, second)))
        found = space.roots()
    return found


@given(graphs(), st.integers(1, 3))
def test_connected_components_are_those_of_networkx(graph, apart):
    count, edges = graph
    found = joined(count, *np.array(edges, np.int32).reshape(-1, 2).T, apart)
    reference = nx.Graph()
    reference.add_nodes_from(range(count))
    reference.add_edges_from(edges)
    for component in nx.connected_components(reference):
        assert {int(found[node]) for node in component} == {min(component)}


def test_long_chains_and_large_graphs():
    count = 20_000
    order = np.random.default_rng(0).permutation(count)
    assert (joined(count, order[:-1], order[1:]) == 0).all()
    pairs = joined(count, np.arange(0, count, 2), np.arange(1, count, 2))
    assert np.array_equal(pairs, np.arange(count) // 2 * 2)


def test_a_parameter_owns_a_label_for_each_index_of_each_dimension():
    space = LabelSpace()
    owned = space.own("conv.weight", (4, 3, 1, 1))
    assert [tuple(layer.shape) for layer in owned.layers] == [(4, 1, 1, 1), (1, 3, 1, 1)]
    assert owned.source == "conv.weight"
    assert space.count == 7
    again = space.own("conv.weight", (4, 3, 1, 1))
    assert space.count == 7
    assert all(torch.equal(a, b) for a, b in zip(owned.layers, again.layers, strict=True))
    assert space.side_of(owned.layers[1]) == Side("conv.weight", 1)
    assert space.side_of(owned.layers[1].flip(1)) is None


def test_merging_broadcasts():
    space = LabelSpace()
    rows = space.fresh(6).view(2, 3)
    single = space.fresh(1).view(1, 1)
    space.merge(rows, single)
    assert (space.roots() == 0).all()


def test_merging_along_a_dimension_leaves_the_others_free():
    space = LabelSpace()
    grid = space.fresh(6).view(2, 3)
    assert space.merge_along(grid, [0]).tolist() == [[0, 1, 2]]
    assert space.roots().tolist() == [0, 1, 2, 0, 1, 2]


def test_a_pin_holds_the_whole_class():
    space = LabelSpace()
    labels = space.fresh(4)
    space.merge(labels[:2], labels[2:])
    space.pin(labels[3:], "layer", "aten.sort", "mixed")
    assert space.pinned_roots()[space.roots()].tolist() == [False, True, False, True]


def test_labels_are_owned_once_they_go_with_a_parameters():
    space = LabelSpace()
    early, own = space.fresh(3), space.own("weight", (4, 1)).layers[0].flatten()
    late = space.fresh(4)
    assert space.owned(own) and space.owned(own[3:])
    assert not space.owned(early) and not space.owned(late)
    space.merge(late[2:], early[:2])
    assert not space.owned(early) and not space.owned(late)
    space.merge(early[1:2], own[2:3])
    assert space.owned(early) and space.owned(late)
    assert not space.owned(early[:1]) and not space.owned(late[:3])


def test_a_fork_leaves_the_space_as_it_is():
    space = LabelSpace()
    labels = space.fresh(4)
    fork = space.fork()
    fork.merge(labels[:1], labels[1:])
    fork.pin(fork.fresh(2), "", "", "")
    assert space.count == 4
    assert space.roots().tolist() == [0, 1, 2, 3]
    assert not space.pinned_roots().any()
    assert fork.roots().tolist() == [0, 0, 0, 0, 4, 5]


@pytest.mark.parametrize(
    ("labels", "shape"),
    [
        (torch.arange(3).view(1, 3, 1).expand(2, 3, 4), (1, 3, 1)),
        (torch.arange(3).view(1, 3, 1).repeat(2, 1, 4), (1, 3, 1)),
        (torch.arange(6).view(2, 3), (2, 3)),
        (torch.zeros(1, 1, dtype=torch.long), (1, 1)),
    ],
)
def test_labels_are_kept_once_along_dimensions_they_do_not_vary_in(labels, shape):
    assert compress(labels).shape == shape
    assert torch.equal(compress(labels).expand(labels.shape), labels)


def test_varying_dimensions():
    assert varying(torch.zeros(1, 3, 1, 2)) == (1, 3)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ((2, 5, 12), (2, 5, 3, 4)), ((2, 5, 3, 4), (2, 5, 12)), ((2, 3, 5, 4), (6, 5, 4)), ((6, 5), (2, 3, 5)),
        ((2, 3, 4), (2, 3, 4)), ((4, 4), (2, 2, 4)), ((1, 1, 6), (6,)), ((2, 0, 3), (0, 6)), ((), (1,)), ((3, 1), (3,)),
    ],
)  # fmt: skip
def test_labels_are_reshaped_as_the_tensor_is(before, after):
    for along_which in itertools.product((False, True), repeat=len(before)):
        along = [size if varies else 1 for size, varies in zip(before, along_which, strict=True)]
        labels = torch.arange(prod(along)).view(along)
        got = reshaped(labels, before, after)
        assert torch.equal(got, labels.expand(before).reshape(after))


def test_labels_are_not_repeated_along_samples_and_tokens():
    heads = torch.arange(3).view(1, 1, 3, 1)
    assert reshaped(heads, (2, 5, 3, 4), (2, 5, 12)).stride()[:2] == (0, 0)
    places = torch.arange(4).view(1, 1, 1, 4)
    assert reshaped(places, (2, 3, 5, 4), (6, 5, 4)).stride() == (0, 0, 1)


def test_what_labels_were_compressed_from_is_not_kept():
    wide = torch.arange(6).view(6, 1).repeat(1, 1000)
    assert compress(wide).untyped_storage().nbytes() == 6 * 8


def test_labels_are_joined_in_any_number_of_goes(monkeypatch):
    pairs = [torch.randint(50, (2, 7), generator=torch.Generator().manual_seed(seed)) for seed in range(12)]
    spaces = []
    for at_once in (1, 2**20):
        monkeypatch.setattr(labels_module, "_JOINED_AT_ONCE", at_once)
        space = LabelSpace()
        space.fresh(50)
        for first, second in pairs[:8]:
            space.merge(first, second)
        spaces.append(space.roots())
    assert np.array_equal(*spaces)
    assert 1 < len(np.unique(spaces[0])) < 50


@given(graphs())
def test_members_are_given_what_their_root_has_in_place(graph):
    count, edges = graph
    roots = joined(count, *np.array(edges, np.int32).reshape(-1, 2).T)
    for at_once in (1, 3, 2**18):
        values = np.random.default_rng(0).integers(100, size=count)
        wanted = values[roots]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(labels_module, "_JOINED_AT_ONCE", at_once)
            give_members(values, roots)
            assert np.array_equal(values, wanted)
            assert np.array_equal(picked(wanted, roots), wanted)


@pytest.mark.parametrize("at_once", [1, 2, 3, 2**18])
def test_a_side_is_known_by_labels_that_count_up_throughout(monkeypatch, at_once):
    monkeypatch.setattr(labels_module, "_JOINED_AT_ONCE", at_once)
    space = LabelSpace()
    (labels,) = space.own("norm.weight", (7,)).layers
    assert space.side_of(labels) == Side("norm.weight", 0)
    for place in range(1, 7):
        other = labels.clone()
        other[place:] = other[place:].flip(0) if place < 6 else 0
        assert space.side_of(other) is None
