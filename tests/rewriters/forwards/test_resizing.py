"""What a mask leaves of a tensor, and which calls are run again for it."""

from __future__ import annotations

import operator

import pytest
import torch
import torch.nn.functional as F

from rewriters.analysis.analyse import analyse
from rewriters.forwards import resizing
from rewriters.forwards.label_mask import LabelMask
from rewriters.forwards.resizing import CannotResizeError, Resizer
from rewriters.forwards.tracing import run_call, trace
from rewriters.labelling.labels import Labelled
from tests.rewriters.exactness import random_live
from tests.rewriters.forwards.networks import Split, traced
from tests.rewriters.helpers import Net, conv, image


def test_a_rewriting_that_cuts_nothing_changes_nothing():
    model = Split().eval()
    analysis = analyse(model, (image(),))
    captured, labelling = analysis.captures[0], analysis.labelling
    graph, known, _ = trace(model, captured.root, captured, labelling, labelling.by_tensor())
    resizer = Resizer(graph, known, LabelMask(torch.ones(labelling.space.count, dtype=torch.bool)), "")
    resizer.run()
    assert not resizer.changed
    assert str(resizer.graph) == str(graph)


def test_only_calls_from_which_something_goes_are_run_anew(monkeypatch):
    """Where a forward is computed on the way, on coordinates say, nothing of it is labelled."""

    def forward(m, x):
        first, second = m.a(x).chunk(2, 1)
        weight = torch.tanh(x.mean(1, keepdim=True))
        return m.b(torch.cat([second, F.relu(first) * weight], 1))

    analysis = analyse(Net(forward, a=conv(3, 8), b=conv(8, 2)), (image(),))
    (one,) = analysis.traced
    ran = []

    def noting(op, target, *rest):
        ran.append(target)
        return run_call(op, target, *rest)

    monkeypatch.setattr(resizing, "run_call", noting)
    one.resize(analysis.label_mask(random_live(analysis.channel_map.size, 0.5, 0)))
    assert {"chunk", F.relu, operator.mul, torch.cat} <= set(ran) and not {"mean", torch.tanh} & set(ran)
    ran.clear()
    resizer = one.resize(analysis.label_mask(torch.ones(analysis.channel_map.size, dtype=torch.bool)))
    assert not ran and str(resizer.graph) == str(one.graph)


def test_a_mask_knows_shapes():
    mask = LabelMask(torch.tensor([True, False, True, True]))
    value = Labelled((2, 4, 5), (torch.arange(4).view(1, 4, 1),))
    assert mask.shape(value) == (2, 3, 5)
    assert mask.slim(torch.zeros(2, 4, 5), value).shape == (2, 3, 5)


def test_a_mask_leaves_expanded_dimensions_expanded():
    mask = LabelMask(torch.tensor([True, False, True, True, False, False, True]))
    value = Labelled((2, 3, 4, 5), (torch.arange(3).view(1, 3, 1, 1), torch.arange(3, 7).view(1, 1, 4, 1)))
    whole = torch.randn(3).view(1, 3, 1, 1).expand(2, 3, 4, 5)
    slim = mask.slim(whole, value)
    assert slim.shape == (2, 2, 2, 5) and slim.untyped_storage().nbytes() == 2 * 4
    assert torch.equal(slim, mask.slim(whole.contiguous(), value))


def test_a_reshape_of_as_many_elements_but_others_is_refused():
    """Rows 0 and 1 and columns 0 and 2 of what goes in are not rows 0 and 1 and columns 0 and 1 of what comes out."""
    graph = traced(Net(lambda m, x: x.view(3, 4)), torch.randn(4, 3))
    (view,) = (node for node in graph.nodes if node.target == "view")
    before, after = view.args[0].meta["val"], view.meta["val"]
    elements = torch.arange(12)
    known = {id(tensor): Labelled(tuple(tensor.shape), (elements.view(tensor.shape),)) for tensor in (before, after)}
    mask = LabelMask((elements == 0) | (elements == 5))
    assert mask.shape(known[id(before)]) == mask.shape(known[id(after)]) == (2, 2)
    with pytest.raises(CannotResizeError, match="no form for the channels that are left"):
        Resizer(graph, known, mask, "").run()
