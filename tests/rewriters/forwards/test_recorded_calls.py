"""A traced call has the labels and tensors of the recorded call that it repeats."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from rewriters.forwards.tracing import trace
from rewriters.labelling.channel_map import ALWAYS
from rewriters.labelling.propagate import Labelling
from rewriters.outputs import relative_error, run_eval
from rewriters.recording.capture import capture
from rewriters.recording.pytrees import all_tensors
from tests.rewriters.exactness import TOLERANCE
from tests.rewriters.forwards.networks import slim_and_gated
from tests.rewriters.helpers import Net, conv, image


def test_a_recorded_tensor_stands_in_for_none_of_another_type():
    model = Net(lambda m, x: m.a((x.double() if m.training else x).relu().float()), a=conv(3, 8))
    captured, labelling = capture(model.eval(), (image(),)), Labelling()
    labelling.run(captured)
    model.train()
    graph, *_ = trace(model, captured.root, captured, labelling, labelling.by_tensor())
    (relu,) = graph.find_nodes(op="call_method", target="relu")
    assert relu.meta["val"].dtype == torch.float64


class Writes(nn.Module):
    """Writes to tensors that it made, in whole and in part."""

    def __init__(self):
        super().__init__()
        self.a, self.c = conv(3, 24), conv(24, 2)

    def forward(self, x):
        first, second = self.a(x).chunk(2, 1)
        y = (first + second).mul_(2.0)
        z = torch.cat([first, y], 1).relu_()
        z[:, 12:] += second
        return self.c(z)


def _swapped(m, parts):
    first, second = torch.cat(parts, 1).split([12, 12], 1)
    return m.d(torch.cat([second, first], 1))


def _puts_more_in(m, x):
    parts = m.inner(x)
    parts.append(m.c(x))
    return _swapped(m, parts)


def _takes_out(m, x):
    parts = m.inner(x)
    return _swapped(m, [m.c(x), parts.pop(), parts.pop(0)])


def _names_more(m, x):
    parts = m.named(x)
    parts["c"] = m.c(x)
    return _swapped(m, list(parts.values()))


@pytest.mark.parametrize("forward", [_puts_more_in, _takes_out, _names_more])
def test_what_a_module_gives_in_a_list_or_a_dict_may_change_there(forward):
    def build():
        inner = Net(lambda m, x: [m.a(x), m.b(x)], a=conv(3, 8), b=conv(3, 8))
        named = Net(lambda m, x: dict(zip("ab", m.inner(x), strict=True)), inner=inner)
        return Net(forward, inner=inner, named=named, c=conv(3, 8), d=conv(24, 2))

    slim_model, gated = slim_and_gated(build, image().double())
    example = (image().double(),)
    assert relative_error(run_eval(slim_model, example), run_eval(gated, example)) <= TOLERANCE
    outputs = {call.path: call.output for call in capture(gated, example).calls()}
    assert len(outputs["inner"]) == 2 and len(outputs.get("named", "ab")) == 2


def test_forwards_that_write_in_place_are_traced_on_what_was_recorded():
    slim_model, gated = slim_and_gated(Writes, image().double())
    example = (image().double(),)
    assert relative_error(run_eval(slim_model, example), run_eval(gated, example)) <= TOLERANCE


ATEN = torch.ops.aten


@pytest.mark.parametrize(
    ("forward", "anew"),
    [
        (lambda m, x: torch.cat([part.mul(2.0) for part in m.a(x).split([3, 5], 1)], 1), []),
        (lambda m, x: (m.a(x) * 2.0).add_(m.a(x)).relu(), []),
        (lambda m, x: torch.cat(m.a(x).split([3, 5], 1)[:: -1 if m.training else 1], 1), [ATEN.cat]),
        (
            lambda m, x: torch.cat(m.a(x).split([5, 3] if m.training else [3, 5], 1), 1),
            [ATEN.split_with_sizes, ATEN.cat],
        ),
        (lambda m, x: m.a(x).mul(2.0).relu() if m.training else m.a(x).mul(2.0), [ATEN.relu]),
        (lambda m, x: m.a(x).mul(1.0).mul(2.0) if m.training else m.a(x).mul(2.0), [ATEN.mul, ATEN.mul]),
        (lambda m, x: (m.a(x) if m.training else m.a(x).exp()).mul(2.0).relu(), [ATEN.mul, ATEN.relu]),
        (lambda m, x: (m.a(x), m.training or x.exp())[0].mul(2.0).relu(), []),
        (lambda m, x: m.a(x).softmax(1) if m.training else m.a(x).log_softmax(1), [ATEN._softmax]),
    ],
)
def test_only_calls_that_did_not_run_when_it_was_recorded_are_labelled_anew(forward, anew, monkeypatch):
    model = Net(lambda m, x: m.b(forward(m, x)), a=conv(3, 8), b=conv(8, 2)).eval()
    captured, labelling = capture(model, (image(),)), Labelling()
    labelling.run(captured)
    recorded = labelling.by_tensor()
    classes = labelling.class_of_label().copy()
    apply, ran = Labelling.apply, []

    def noting(self, op, *rest):
        ran.append(op.overloadpacket)
        return apply(self, op, *rest)

    monkeypatch.setattr(Labelling, "apply", noting)
    model.training = True
    graph, known, _ = trace(model, captured.root, captured, labelling, recorded)
    assert ran == anew
    if not anew:
        labels = {id(labels) for labels in recorded.values()}
        assert all(id(known[id(tensor)]) in labels for tensor in all_tensors(graph))
        assert {id(tensor) for tensor in all_tensors(graph)} <= recorded.keys()
        assert (labelling.class_of_label() == classes).all() and (classes != ALWAYS).any()
