"""Tracing one module's own forward: control flow is guarded, sizes stay expressions, signatures stay."""

from __future__ import annotations

import copy
import gc
import inspect
import linecache
import operator
import pickle
import traceback

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from rewriters import resizing
from rewriters.analysis import analyse
from rewriters.capture import capture
from rewriters.channel_map import ALWAYS, Side
from rewriters.errors import TraceError
from rewriters.forward import InterpretedForward, RewrittenForward, ShapeGuardError
from rewriters.labels import Labelled
from rewriters.propagate import Labelling
from rewriters.rehearsal import rehearse
from rewriters.resizing import Cut, Resizer, Unwritable
from rewriters.traced import all_tensors
from rewriters.tracing import run_call, trace
from rewriters.verify import relative_error, run_eval
from tests.rewriters.exactness import TOLERANCE, assert_exact, random_live, slim, zero_kernels
from tests.rewriters.helpers import Net, conv, image


def traced(model: nn.Module, *args, **kwargs):
    """The traced graph of a model's own forward."""
    analysis = analyse(model, args, kwargs)
    captured, labelling = analysis.captures[0], analysis.labelling
    return trace(model, captured.root, captured, labelling, labelling.by_tensor())[0]


def traced_in(model: nn.Module, training: bool, args, kwargs):
    """The traced graph of a model's own forward in a mode."""
    captured, labelling = capture(model.train(training), args, kwargs), Labelling()
    labelling.run(captured)
    return trace(model, captured.root, captured, labelling, labelling.by_tensor())[0]


def rewritten(model: nn.Module, *args, **kwargs) -> nn.Module:
    """The model running its own forward as it was traced, nothing having been cut."""
    graph = traced(model, *args, **kwargs)
    model.forward = RewrittenForward(model, {False: graph, True: graph})
    return model


class Split(nn.Module):
    """Two convolutions that share the halves of a third's channels."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = conv(3, 8, 3), conv(4, 4, 3), conv(8, 2)

    def forward(self, x, scale=None, *, power: float = 1.0):
        first, second = self.a(x).chunk(2, 1)
        if scale is not None:
            first = first * scale
        if x.shape[-1] > 8:
            first = F.relu(first)
        return self.c(torch.cat([second, self.b(first)], 1)) ** power


def slim_and_gated(build, *args, **kwargs):
    torch.manual_seed(0)
    slim_model = build().double().eval()
    gated = copy.deepcopy(slim_model)
    slimmed = slim(slim_model, args, kwargs, share=0.6, seed=3)
    channel_map = slimmed.analysis.channel_map
    zero_kernels(gated, channel_map, random_live(channel_map.size, 0.6, 3))
    assert slimmed.plan.forwards
    return slim_model, gated


def test_a_rewritten_forward_runs_at_other_batch_sizes_and_resolutions():
    slim_model, gated = slim_and_gated(Split, image(size=4).double())
    for batch, size in ((1, 4), (5, 4), (2, 6), (3, 8)):
        args = (image(size=size, batch=batch).double(),)
        assert relative_error(run_eval(slim_model, args), run_eval(gated, args)) <= TOLERANCE


def test_other_control_flow_than_the_traced_one_raises():
    slim_model, _ = slim_and_gated(Split, image(size=4).double())
    with pytest.raises(ShapeGuardError, match="rewritten for a case where"):
        slim_model(image(size=12).double())
    with pytest.raises(ShapeGuardError):
        slim_model(image(size=4).double(), torch.ones(1).double())


def test_signature_defaults_and_keywords_survive():
    slim_model, gated = slim_and_gated(Split, image().double(), power=2.0)
    parameters = inspect.signature(next(iter(slim_model.forward._functions.values()))).parameters
    assert list(inspect.signature(slim_model.forward).parameters) == list(parameters)[1:]
    assert list(parameters) == ["self", "x", "scale", "power"]
    assert parameters["scale"].default is None
    args = (image(batch=3).double(),)
    for kwargs in ({"power": 2.0}, {"scale": None, "power": 3.0}):
        assert relative_error(run_eval(slim_model, args, kwargs), run_eval(gated, args, kwargs)) <= TOLERANCE


def lines_kept() -> int:
    return sum(name.startswith("<autogate") for name in linecache.cache)


def test_what_is_rewritten_for_a_trial_leaves_nothing_behind():
    gc.collect()
    before = lines_kept()
    model = Split().eval()
    rehearse(model, analyse(model, (image(),)), (image(),))
    gc.disable()  # forwards go without it
    try:
        assert lines_kept() == before
        slim_model, _ = slim_and_gated(Split, image().double())
        assert lines_kept() == before + 1
        del slim_model
    finally:
        gc.enable()
    gc.collect()
    assert lines_kept() == before


def test_forwards_of_the_same_code_share_it():
    blocks = [rewritten(Split(), image()) for _ in range(2)]
    codes = {block.forward.function(training).__code__ for block in blocks for training in (False, True)}
    assert len({id(code) for code in codes}) == 1
    other = rewritten(Split(), image(), scale=2.0)
    assert other.forward.__code__ not in codes
    with pytest.raises(ShapeGuardError) as raised:
        other(image(size=16), scale=2.0)
    assert "guard(" in "".join(traceback.format_tb(raised.tb))


def test_the_module_stays_what_it_was():
    slim_model, _ = slim_and_gated(Split, image().double())
    assert type(slim_model) is Split
    assert isinstance(slim_model.forward, RewrittenForward)
    assert [name for name, _ in slim_model.named_children()] == ["a", "b", "c"]


def test_a_rewritten_forward_is_copied_and_pickled_with_its_module():
    slim_model, _ = slim_and_gated(Split, image().double())
    example = (image().double(),)
    for other in (copy.deepcopy(slim_model), pickle.loads(pickle.dumps(slim_model))):
        assert other.forward.owner is other
        assert torch.equal(run_eval(other, example)[0], run_eval(slim_model, example)[0])
        with torch.no_grad():
            other.c.bias += 1
        assert not torch.equal(run_eval(other, example)[0], run_eval(slim_model, example)[0])


def test_a_recorded_tensor_stands_in_for_none_of_another_type():
    model = Net(lambda m, x: m.a((x.double() if m.training else x).relu().float()), a=conv(3, 8))
    captured, labelling = capture(model.eval(), (image(),)), Labelling()
    labelling.run(captured)
    model.train()
    graph, _ = trace(model, captured.root, captured, labelling, labelling.by_tensor())
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


def test_an_interpreted_forward_does_what_the_compiled_one_does():
    class Block(Modes):
        def __init__(self):
            super().__init__()
            self.again = self.c

        def forward(self, x, *others, scale=1.0, **more):
            x = sum(others, x) * scale + more.get("shift", 0.0)
            out = super().forward(x)
            return self.again(F.pad(out[0] if self.training else out, (0, 0, 0, 0, 0, 6)))

    block = Block()
    given, options = (image(), image()), {"scale": 2.0, "shift": 1.0}
    graphs = {training: traced_in(block, training, given, options) for training in (False, True)}
    assert str(graphs[True]) != str(graphs[False])
    plain = {training: block.train(training)(*given, **options) for training in (False, True)}
    for kind in (InterpretedForward, RewrittenForward):
        forward = kind(block, graphs)
        assert all(torch.equal(block.train(mode) and forward(*given, **options), plain[mode]) for mode in plain)
        with pytest.raises(TypeError, match="missing"):
            forward(scale=2.0)


class Modes(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.c = conv(3, 8), conv(8, 2)

    def forward(self, x):
        first, second = self.a(x).split([3, 5], 1)
        if self.training:
            return self.c(torch.cat([first, second], 1)), second.mean((2, 3))
        return self.c(torch.cat([first, second], 1))


def test_train_and_eval_keep_their_own_graphs():
    slim_model, gated = slim_and_gated(Modes, image().double())
    sources = slim_model.forward.sources
    assert sources[True] != sources[False]
    example = image().double()
    assert relative_error(run_eval(slim_model, (example,)), run_eval(gated, (example,))) <= TOLERANCE
    out, mean = slim_model.train()(example)
    assert out.shape == (2, 2, 4, 4)
    assert mean.shape[0] == 2


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
    classes = labelling.numbering().copy()
    apply, ran = Labelling.apply, []

    def noting(self, op, *rest):
        ran.append(op.overloadpacket)
        return apply(self, op, *rest)

    monkeypatch.setattr(Labelling, "apply", noting)
    model.training = True
    graph, known = trace(model, captured.root, captured, labelling, recorded)
    assert ran == anew
    if not anew:
        labels = {id(labels) for labels in recorded.values()}
        assert all(id(known[id(tensor)]) in labels for tensor in all_tensors(graph))
        assert {id(tensor) for tensor in all_tensors(graph)} <= recorded.keys()
        assert (labelling.numbering() == classes).all() and (classes != ALWAYS).any()


def variadic(m, *xs, **options):
    parts = [part for x in xs for part in m.a(x).chunk(2, 1)]
    return m.b(torch.cat(parts[::-1], 1)) * options.get("scale", 1.0)


def test_variable_arguments_are_followed():
    example = image().double()
    model = Net(variadic, a=conv(3, 6), b=conv(12, 2)).double().eval()
    slimmed = assert_exact(model, (example, example + 1), {"scale": 0.5})
    assert slimmed.analysis.channel_map.size == 6


def loops(m, x):
    y = m.a(x)
    total = 0
    for i in range(len(m.scales)):
        total = total + y[:, 2 * i : 2 * i + 2] * m.scales[i]
    size = tuple(int(s) for s in y.shape[2:])
    assert y.ndim == 4 and min(size) > 1
    return m.b(total if y.shape[1] % 2 == 0 else -total)


def test_loops_and_assertions_on_sizes_are_followed():
    scales = nn.ParameterList(nn.Parameter(torch.rand(1)) for _ in range(4))
    model = Net(loops, a=conv(3, 8), b=conv(2, 2), scales=scales).double().eval()
    slimmed = assert_exact(model, (image().double(),))
    assert slimmed.analysis.channel_map.size == 2


def test_guards_on_sizes_that_slimming_changes_go():
    """`y.shape[1] % 2 == 0` decided the control flow when all channels were there; the decision stays."""
    model = Net(loops, a=conv(3, 8), b=conv(2, 2), scales=nn.ParameterList([nn.Parameter(torch.rand(1))] * 4))
    slimmed = slim(model.double().eval(), (image().double(),), share=0.5, seed=1)
    assert slimmed.plan.live.tolist() != [True, True]
    assert slimmed.error <= TOLERANCE


def test_tensors_made_from_numbers_are_seen():
    def forward(m, x):
        y = m.a(x)
        ramp = torch.arange(x.shape[-1], dtype=x.dtype) + torch.tensor([0.5], dtype=x.dtype)
        first, second = y.split([3, 5], 1)
        return m.b(torch.cat([second * ramp, first * torch.linspace(0, 1, x.shape[-1], dtype=x.dtype)], 1))

    slim_model, gated = slim_and_gated(lambda: Net(forward, a=conv(3, 8), b=conv(8, 2)), image().double())
    args = (image(size=6, batch=3).double(),)
    assert relative_error(run_eval(slim_model, args), run_eval(gated, args)) <= TOLERANCE


def test_plain_tensor_attributes_are_seen():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = conv(3, 8), conv(8, 2)
            self.scale = torch.tensor([2.0])  # no parameter and no buffer

        def forward(self, x):
            first, second = self.a(x).split([3, 5], 1)
            return self.b(torch.cat([second, first], 1) * self.scale.to(x))

    slimmed = assert_exact(Scaled().double().eval(), (image().double(),))
    assert slimmed.analysis.channel_map.size == 8


def test_what_cannot_be_followed_is_refused_and_leaves_nothing_behind():
    def forward(m, x):
        first, second = m.a(x).chunk(2, 1)
        hidden = torch.Tensor([1.0])  # made by a class, which torch.fx does not see
        return m.b(torch.cat([second, first], 1) + hidden)

    model = Net(forward, a=conv(3, 8), b=conv(8, 2)).eval()
    names = [set(vars(module)) for module in model.modules()]
    analysis = analyse(model, (image(),))
    assert [set(vars(module)) for module in model.modules()] == names
    assert analysis.channel_map.size == 0
    with pytest.raises(TraceError):
        traced(model, image())


def test_a_module_called_in_several_ways_keeps_its_channels():
    class Half(nn.Module):
        def forward(self, x, drop=False):
            first, second = x.chunk(2, 1)
            return second if drop else torch.cat([second, first], 1)

    half = Half()
    model = Net(
        lambda m, x: m.c(m.swap(m.a(x))) + m.d(m.swap(m.b(x), drop=True)),
        a=conv(3, 8), b=conv(3, 8), swap=half, c=conv(8, 2), d=conv(4, 2),
    )  # fmt: skip
    slimmed = assert_exact(model.double().eval(), (image().double(),))
    assert slimmed.analysis.channel_map.size == 0


def test_a_module_called_twice_the_same_way_loses_the_same_channels():
    class Half(nn.Module):
        def forward(self, x):
            first, second = x.chunk(2, 1)
            return torch.cat([second, first], 1)

    model = Net(
        lambda m, x: m.c(m.swap(m.a(x))) + m.d(m.swap(m.b(x))),
        a=conv(3, 8), b=conv(3, 8), swap=Half(), c=conv(8, 2), d=conv(8, 2),
    )  # fmt: skip
    slimmed = assert_exact(model.double().eval(), (image().double(),))
    assert slimmed.analysis.channel_map.size == 8


def test_a_rewriting_that_cuts_nothing_changes_nothing():
    model = Split().eval()
    analysis = analyse(model, (image(),))
    captured, labelling = analysis.captures[0], analysis.labelling
    graph, known = trace(model, captured.root, captured, labelling, labelling.by_tensor())
    resizer = Resizer(graph, known, Cut(torch.ones(labelling.space.count, dtype=torch.bool)), "")
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
    one.resize(analysis.cut(random_live(analysis.channel_map.size, 0.5, 0)))
    assert {"chunk", F.relu, operator.mul, torch.cat} <= set(ran) and not {"mean", torch.tanh} & set(ran)
    ran.clear()
    resizer = one.resize(analysis.cut(torch.ones(analysis.channel_map.size, dtype=torch.bool)))
    assert not ran and str(resizer.graph) == str(one.graph)


def test_a_cut_knows_shapes():
    cut = Cut(torch.tensor([True, False, True, True]))
    value = Labelled((2, 4, 5), (torch.arange(4).view(1, 4, 1),))
    assert cut.shape(value) == (2, 3, 5)
    assert cut.slim(torch.zeros(2, 4, 5), value).shape == (2, 3, 5)


def test_a_cut_leaves_expanded_dimensions_expanded():
    cut = Cut(torch.tensor([True, False, True, True, False, False, True]))
    value = Labelled((2, 3, 4, 5), (torch.arange(3).view(1, 3, 1, 1), torch.arange(3, 7).view(1, 1, 4, 1)))
    whole = torch.randn(3).view(1, 3, 1, 1).expand(2, 3, 4, 5)
    slim = cut.slim(whole, value)
    assert slim.shape == (2, 2, 2, 5) and slim.untyped_storage().nbytes() == 2 * 4
    assert torch.equal(slim, cut.slim(whole.contiguous(), value))


def test_a_reshape_of_as_many_elements_but_others_is_refused():
    """Rows 0 and 1 and columns 0 and 2 of what goes in are not rows 0 and 1 and columns 0 and 1 of what comes out."""
    graph = traced(Net(lambda m, x: x.view(3, 4)), torch.randn(4, 3))
    (view,) = (node for node in graph.nodes if node.target == "view")
    before, after = view.args[0].meta["val"], view.meta["val"]
    elements = torch.arange(12)
    known = {id(tensor): Labelled(tuple(tensor.shape), (elements.view(tensor.shape),)) for tensor in (before, after)}
    cut = Cut((elements == 0) | (elements == 5))
    assert cut.shape(known[id(before)]) == cut.shape(known[id(after)]) == (2, 2)
    with pytest.raises(Unwritable, match="no form for the channels that are left"):
        Resizer(graph, known, cut, "").run()


@torch.fx.wrap
def _halves(x):
    left, right = x.chunk(2, 1)
    return left * right


def test_functions_declared_leaves_are_followed():
    """torchvision's windowed attention is one."""
    model = Net(lambda net, x: net.head(_halves(net.stem(x))), stem=conv(3, 8), head=conv(4, 2)).double()
    slimmed = assert_exact(model, (image().double(),))
    assert Side("stem.weight", 0) in slimmed.analysis.channel_map.classes


@pytest.mark.parametrize(
    "scale",
    [lambda x: x.shape[1] ** -0.5, lambda x: x.shape[1], lambda x: 1 / x.shape[1], lambda x: x.shape[2] * x.shape[1]],
)
def test_a_factor_computed_from_a_width_stays_what_it_was(scale):
    def forward(net, x):
        left, right = net.stem(x).chunk(2, 1)
        return net.head(left * scale(left) + right)

    model = Net(forward, stem=conv(3, 8), head=conv(4, 2)).double()
    slimmed = assert_exact(model, (image().double(),))
    assert Side("stem.weight", 0) in slimmed.analysis.channel_map.classes


def in_full_precision(m, x):
    first, second = m.a(x).split([3, 5], 1)
    with torch.autocast(device_type=x.device.type, enabled=False):
        y = torch.cat([first, second * second], 1).float()
    return m.b(y)


def test_where_a_forward_leaves_autocast_it_leaves_it_rewritten():
    example = image()
    model = Net(in_full_precision, a=conv(3, 8), b=conv(8, 2)).eval()
    gated = copy.deepcopy(model)
    slimmed = slim(model, (example,), {}, share=0.5, seed=3)
    zero_kernels(gated, slimmed.analysis.channel_map, random_live(slimmed.analysis.channel_map.size, 0.5, 3))
    assert "" in slimmed.plan.forwards
    with torch.autocast("cpu", torch.bfloat16):
        outputs = [run_eval(one, (example,)) for one in (model, gated)]
        assert torch.is_autocast_enabled("cpu")
    assert relative_error(*outputs) <= 1e-2
    assert not torch.is_autocast_enabled("cpu")


def partly_without_gradients(m, x):
    y = m.a(x).view(x.shape[0], 4, 2, -1)
    with torch.no_grad():
        y = y * y.detach()
    return m.b(y.reshape(x.shape[0], 8, *x.shape[2:]))


def test_what_is_computed_without_gradients_is_not_traced():
    model = Net(partly_without_gradients, a=conv(3, 8), b=conv(8, 2)).eval()
    with pytest.raises(TraceError, match="whether gradients"):
        traced(model, image())
    analysis = analyse(model, (image(),))
    assert analysis.channel_map.size == 0
    assert torch.is_grad_enabled()


class Asks(nn.Module):
    """Uses its mode as nothing but a bool can be used."""

    def __init__(self, use):
        super().__init__()
        self.a, self.b, self.use = conv(3, 8), conv(8, 2), use

    def forward(self, x):
        first, second = self.a(x).split([3, 5], 1)
        return self.b(torch.cat([first, second], 1)) * self.use(self.training)


@pytest.mark.parametrize(
    "use", [lambda mode: 3 - mode, lambda mode: 2 if mode else 3, lambda mode: {True: 2, False: 3}[mode]]
)
def test_each_use_of_the_mode_is_seen(use):
    slim_model, gated = slim_and_gated(lambda: Asks(use), image().double())
    example = image().double()
    for mode in (False, True):
        assert relative_error([slim_model.train(mode)(example)], [gated.train(mode)(example)]) <= TOLERANCE


def test_a_forward_that_does_not_ask_for_its_mode_is_traced_once():
    analysis = analyse(Split(), (image(),))
    assert [one.modes for one in analysis.traced] == [(False, True)]


class Shares(nn.Module):
    """A child that stands in another module too, where it was registered first."""

    def __init__(self, child):
        super().__init__()
        self.a, self.child, self.b = conv(3, 8), child, conv(8, 2)

    def forward(self, x):
        first, second = self.a(x).split([4, 4], 1)
        return self.b(torch.cat([self.child(first), second], 1))


def test_a_child_with_two_names_is_known_by_either():
    child = conv(4, 4, 3)
    model = Net(lambda m, x: m.second(F.pad(m.first(x), (0, 0, 0, 0, 0, 1))), first=Shares(child), second=Shares(child))
    slimmed = assert_exact(model.double().eval(), (image().double(),))
    assert {"first", "second"} <= set(slimmed.plan.forwards)
