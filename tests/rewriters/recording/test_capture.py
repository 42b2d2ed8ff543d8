"""Capture computes nothing, changes nothing, and names what it can't record."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import autogate
from rewriters.analysis.analyse import analyse
from rewriters.errors import CaptureError
from rewriters.recording.capture import capture
from tests.rewriters.exactness import assert_exact
from tests.rewriters.helpers import Net, classes, conv, image, mapped


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = conv(3, 4)

    def forward(self, x):
        y = self.a(x)
        if y.sum() > 0:  # the line that the error must name
            y = -y
        return y


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = Branching()

    def forward(self, x):
        return x[x > 0]


@pytest.mark.parametrize(("model", "line"), [(Branching(), "if y.sum() > 0"), (Counting(), "x[x > 0]")])
def test_data_dependent_forwards_are_refused_with_the_line(model, line):
    with pytest.raises(CaptureError, match="depends on the values of a tensor") as error:
        capture(model, (image(),))
    assert line in str(error.value)
    assert "test_capture.py" in str(error.value)


def test_branches_on_a_buffer_are_followed():
    def forward(m, x):
        return m.a(x) if m.flag.item() > 0 else m.b(x)

    model = Net(forward, a=conv(3, 4), b=conv(3, 4), flag=torch.ones(1)).eval()
    assert [call.path for call in capture(model, (image(),)).calls()] == ["", "a"]


def test_values_of_plain_attributes_are_known():
    """A detector's strides: a tensor that is no buffer, whose elements are taken as numbers."""

    def forward(m, x):
        grid = torch.cat([x.new_full((2, 1, 4, 4), m.strides[place]) for place in range(2)], 1)
        return m.b(torch.cat([m.a(x), grid if m.strides[1] > 1 else -grid], 1))

    model = Net(forward, a=conv(3, 8), b=conv(10, 2)).double()
    model.strides = torch.tensor([0.5, 2.0])
    analysis = assert_exact(model, (image().double(),)).analysis
    assert not analysis.opaque and analysis.channel_map.size == 8
    assert type(model.strides) is torch.Tensor and model.strides.tolist() == [0.5, 2.0]


def test_values_of_plain_attributes_that_are_written_to_are_forgotten():
    def forward(m, x):
        m.counter[0] = x.sum()
        return m.a(x) if m.counter[0] > 0 else m.b(x)

    model = Net(forward, a=conv(3, 4), b=conv(3, 4)).eval()
    model.counter = torch.ones(2)
    with pytest.raises(CaptureError, match="depends on the values of a tensor"):
        capture(model, (image(),))
    assert model.counter.tolist() == [1, 1]


def test_nothing_in_the_model_changes():
    model = nn.Sequential(conv(3, 4), nn.BatchNorm2d(4), nn.Dropout(), conv(4, 2)).train()
    before = copy.deepcopy(model.state_dict())
    names = [set(vars(module)) for module in model.modules()]
    random_state = torch.get_rng_state()
    example = image().requires_grad_()
    analyse(model, (example,))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert [set(vars(module)) for module in model.modules()] == names
    assert all(module.training for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), random_state)


def test_nothing_changes_in_a_module_with_two_names_or_in_tied_parameters():
    model = Net(lambda m, x: m.second(m.again(x)), first=conv(3, 3), second=conv(3, 3))
    model.again = model.first
    model.second.weight = model.first.weight
    tensors = {name: id(value) for name, value in model.state_dict(keep_vars=True).items()}
    captured = capture(model, (image(),))
    assert {name: id(value) for name, value in model.state_dict(keep_vars=True).items()} == tensors
    assert [call.path for call in captured.root.children] == ["first", "second"]


def test_every_module_keeps_its_own_mode():
    model = nn.Sequential(conv(3, 4), nn.BatchNorm2d(4), conv(4, 2)).train()
    model[1].eval()
    analyse(model, (image(),))
    assert [module.training for module in model] == [True, False, True]


def test_calls_form_the_tree_of_modules():
    model = nn.Sequential(nn.Sequential(conv(3, 4), nn.ReLU()), conv(4, 2)).eval()
    captured = capture(model, (image(),))
    assert [call.path for call in captured.calls()] == ["", "0", "0.0", "0.1", "1"]
    assert captured.root.output.shape == (2, 2, 4, 4)
    ops = [str(node.target) for call in captured.calls() for node in call.nodes]
    assert ops == ["aten.convolution.default", "aten.relu.default", "aten.convolution.default"]


def test_large_inputs_cost_nothing():
    captured = capture(nn.Sequential(conv(3, 64, 3)).eval(), (torch.empty(1).expand(64, 3, 4096, 4096),))
    assert captured.root.output.shape == (64, 64, 4096, 4096)


def test_inputs_in_containers_and_by_keyword():
    def forward(m, pair, *, more=None):
        out = m.a(pair[0]) + m.a(pair[1])
        return {"out": m.b(out if more is None else out + more["x"]), "rest": [out.mean()]}

    model = Net(forward, a=conv(3, 4), b=conv(4, 2)).eval()
    analysis = analyse(model, ([image(), image()],), {"more": {"x": image(4)}})
    assert analysis.captures[0].root.output["out"].shape == (2, 2, 4, 4)


def test_in_place_ops_couple_what_they_write_to():
    def forward(m, x):
        y = m.a(x)
        y.add_(m.b(x)).relu_()
        y.mul_(2)
        return m.c(y)

    found = mapped(forward, a=conv(3, 4), b=conv(3, 4), c=conv(4, 2))
    assert classes(found, "a.weight", 0) == classes(found, "b.weight", 0) == classes(found, "c.weight", 1)


def _as_video(m, x):
    frames = m.a(x)
    frames.unsqueeze_(1)
    out = m.relu(frames)
    out.squeeze_(1)
    return out


def _by_pixel(m, x):
    pixels = m.a(x).flatten(2)
    pixels.transpose_(1, 2)
    return pixels.mean(1)[:, :, None, None]


@pytest.mark.parametrize("forward", [_as_video, _by_pixel])
def test_values_keep_the_shapes_they_had_before_an_op_gave_them_another_in_place(forward):
    inner = Net(forward, a=conv(8, 6), relu=nn.ReLU())
    model = Net(lambda m, x: m.c(m.inner(m.b(x))), inner=inner, b=conv(3, 8), c=conv(6, 2)).double().eval()
    example = image().double()
    captured = capture(model, (example,))
    calls = {call.path: call for call in captured.calls()}
    assert calls["inner.a"].output.shape == (2, 6, 4, 4)
    for node in captured.graph.find_nodes(op="call_function", target=torch.ops.aten.unsqueeze_.default):
        assert node.args[0].meta["val"] is calls["inner.a"].output and node.meta["val"].shape == (2, 1, 6, 4, 4)
    channel_map = assert_exact(model, (example,)).analysis.channel_map
    assert channel_map.size == 8  # between b and the inner network
    assert any("in place" in pin.reason for pin in channel_map.pins)


def test_in_place_writes_into_a_buffer_of_the_forward():
    def forward(m, x):
        out = x.new_zeros(x.shape[0], 6, *x.shape[2:])
        out[:, :4] = m.a(x)
        out[:, 4:] = m.b(x)
        return m.c(out)

    found = mapped(forward, a=conv(3, 4), b=conv(3, 2), c=conv(6, 2))
    assert classes(found, "c.weight", 1) == classes(found, "a.weight", 0) + classes(found, "b.weight", 0)
    assert found.size == 6


class WithAuxiliary(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.aux = conv(3, 4), conv(4, 2), conv(4, 5)

    def forward(self, x):
        x = F.relu(self.a(x))
        return (self.b(x), self.aux(x)) if self.training else self.b(x)


def test_heads_that_run_in_train_mode_only_are_seen():
    analysis = analyse(WithAuxiliary().eval(), (image(),))
    assert len(analysis.captures) == 2
    found = analysis.channel_map
    assert classes(found, "aux.weight", 1) == classes(found, "a.weight", 0) == [0, 1, 2, 3]


def test_one_capture_does_where_both_modes_run_the_same_layers():
    assert len(analyse(nn.Sequential(conv(3, 4), conv(4, 2)), (image(),)).captures) == 1


def test_a_forward_that_fails_is_refused_with_its_module():
    with pytest.raises(CaptureError, match="fails on the example inputs") as error:
        capture(nn.Sequential(conv(3, 4), conv(5, 2)), (image(),))
    assert str(error.value).startswith("1: ")


def test_shared_parameters_go_by_their_first_name():
    model = nn.Sequential(conv(4, 4), conv(4, 4))
    model[1].weight = model[0].weight
    captured = capture(model.eval(), (image(4),))
    assert set(captured.tensors) == {"0.weight", "0.bias", "1.bias"}


class Pooled(nn.Module):
    """Pooling a channels_last tensor to one pixel gives the strides anew of the dimensions of size 1."""

    def __init__(self):
        super().__init__()
        self.a, self.pool, self.b = conv(3, 4), nn.AdaptiveAvgPool2d(1), nn.Linear(4, 2)

    def forward(self, x):
        return self.b(self.pool(self.a(x)).flatten(1))


def test_the_memory_format_makes_no_difference():
    model = Pooled().eval()
    plain = analyse(model, (image(),)).channel_map
    model = model.to(memory_format=torch.channels_last)
    last = analyse(model, (image().to(memory_format=torch.channels_last),)).channel_map
    assert plain.size == 4
    assert plain.difference(last) is None


class Keeping(nn.Module):
    """Keeps what it computes: in a dict, in a list, as an attribute, as a new one."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))
        self.first = nn.Conv2d(3, 4, 1)
        self.second = nn.Conv2d(4, 2, 1)
        self.cache, self.seen, self.latest = {"kept": 1}, [], None

    def forward(self, x):
        if "scale" not in self.cache:
            self.cache["scale"] = self.scale.view(-1, 1, 1) * 2
        self.seen.append(self.cache["scale"])
        self.latest = self.added = x
        return self.second(self.first(x) * self.cache["scale"])


def test_what_a_forward_keeps_of_stand_ins_doesnt_stay():
    model, x = nn.Sequential(Keeping(), nn.Flatten(), nn.Linear(2 * 16, 2)).eval(), torch.randn(2, 3, 4, 4)
    cache = model[0].cache
    autogate.prepare(model, x)
    assert model[0].cache is cache == {"kept": 1} and model[0].seen == [] and model[0].latest is None
    assert not hasattr(model[0], "added")
    with torch.no_grad():
        autogate.gates(model).alpha[:2] = 0
        averaged = copy.deepcopy(model)
        assert torch.equal(averaged(x), model(x))


class Queries(nn.Module):
    """Uses an embedding's weight without calling it, and looks at values in train mode."""

    def __init__(self):
        super().__init__()
        self.embedding, self.a, self.b = nn.Embedding(4, 3), nn.Linear(3, 5), nn.Linear(5, 2)

    def forward(self, x):
        y = self.a(x + self.embedding.weight)
        if self.training and not torch.isfinite(y).all():
            y = y.clamp(-1, 1)
        return self.b(y)


def test_parameters_that_are_used_without_a_call_need_no_recording_in_train_mode():
    analysis = analyse(Queries(), (torch.randn(2, 4, 3),))
    assert len(analysis.captures) == 1
    assert analysis.channel_map.size == 5


@pytest.mark.parametrize("second", [nn.Linear(5, 2), nn.BatchNorm1d(5)])
def test_what_does_not_fit_is_refused(second):
    with pytest.raises(CaptureError):
        capture(nn.Sequential(nn.Linear(3, 4), second).eval(), (torch.randn(2, 3),))
