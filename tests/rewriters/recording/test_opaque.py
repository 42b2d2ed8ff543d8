"""Modules that can't be recorded stay as they are, and the rest of the model is slimmed."""

import copy
import random
import re

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import autogate
from rewriters.analysis.analyse import analyse
from rewriters.errors import AutogateError, CaptureError
from rewriters.recording.capture import capture
from rewriters.recording.opaque import opaque_modules_stubbed
from tests.rewriters.exactness import assert_exact
from tests.rewriters.helpers import Net, classes, conv, image, is_pinned, reasons
from tests.rewriters.recording.opaque_nets import (
    Borrowing,
    Careful,
    Drawing,
    Outside,
    OwnOp,
    Parent,
    Pick,
    Positive,
    Scale,
    Scaled,
    Several,
)


def around(*middle: nn.Module) -> nn.Sequential:
    """Modules that can't be recorded between convolutions: 0, 2, ... , the last two."""
    torch.manual_seed(0)
    return nn.Sequential(conv(3, 8), nn.ReLU(), conv(8, 8), *middle, conv(8, 8), nn.ReLU(), conv(8, 2)).eval()


def slimmed(model: nn.Module, *inputs: Tensor) -> nn.Module:
    """The model without every other class of its channels; finalize compares the outputs."""
    model = autogate.prepare(model, inputs, flops=1.0)
    with torch.no_grad():
        autogate.gates(model).alpha[::2] = 0
    return autogate.finalize(model, warn=False).eval()


def test_what_is_around_it_is_free_and_its_borders_stay():
    found = analyse(around(Pick()), (image(),)).channel_map
    assert classes(found, "0.weight", 0) == classes(found, "2.weight", 1) == list(range(8))
    assert classes(found, "4.weight", 0) == classes(found, "6.weight", 1) == list(range(8, 16))
    assert is_pinned(found, "2.weight", 0) and is_pinned(found, "4.weight", 1)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize(
    "compiled", [torch.jit.script, lambda module: torch.jit.trace(module, torch.randn(2, 8, 4, 4))]
)
def test_what_torch_jit_has_compiled_stays_as_it_is(compiled):
    part = compiled(nn.Sequential(conv(8, 8), nn.BatchNorm2d(8), nn.ReLU()).eval())
    model = slimmed(around(part), image())
    assert model[3] is part and model[0].out_channels == 4 and model[2].out_channels == 8
    with pytest.raises(AutogateError, match=r"torch\.jit has compiled it"):
        autogate.prepare(compiled(conv(8, 8)), torch.randn(2, 8, 4, 4))


def test_the_summary_names_it_with_its_line():
    model = autogate.prepare(around(Pick()), image())
    (pin,) = (pin for pin in autogate.summary(model).pins if pin.module == "3")
    said = "its forward can't be recorded: the forward depends on the values of a tensor, at "
    assert pin.reason.startswith(said) and pin.op == "forward"
    assert re.search(r"opaque_nets\.py:\d+: return x if x\.sum\(\) > 0 else -x", pin.reason)
    assert "its forward can't be" in re.sub(r"\s+", " ", str(autogate.summary(model)))


@pytest.mark.parametrize("middle", [Pick, Positive, Outside, OwnOp, Scaled, Scale])
def test_the_rest_is_slimmed_exactly(middle):
    model = slimmed(around(middle()), image())
    assert [model[at].weight.shape[:2] for at in (0, 2, 4, 6)] == [(4, 3), (8, 4), (4, 8), (2, 4)]


@pytest.mark.parametrize("middle", [Pick, Positive, Scale, Parent])
def test_any_pattern_of_dead_channels_is_exact(middle):
    assert_exact(around(middle()).double(), (image().double(),))


def test_the_innermost_module_is_opaque_and_its_siblings_are_slimmed():
    model = around(Parent())
    captured = capture(model, (image(),))
    assert list(captured.opaque) == ["3.pick"]
    model = slimmed(model, image())
    assert model[3].b.weight.shape[:2] == (4, 8) and model[3].c.weight.shape[:2] == (4, 4)
    assert model[3].a.weight.shape[0] == 8


def test_the_module_outwards_is_opaque_where_the_innermost_gives_no_tensors():
    assert list(capture(around(Scaled()), (image(),)).opaque) == ["3"]


def test_one_inside_another_that_becomes_opaque_later_is_no_piece_of_its_own():
    class Both(Scaled):
        def __init__(self):
            super().__init__()
            self.pick = Pick()

        def forward(self, x):
            return super().forward(self.pick(x))

    assert list(capture(around(Both(), Pick()), (image(),)).opaque) == ["3", "4"]


def test_a_module_that_is_called_twice_gives_its_own_each_time():
    def forward(m, x):
        x = m.c(m.pick(m.b(m.pick(m.a(x)).relu())))
        return m.d(x.relu())

    torch.manual_seed(0)
    members = {"a": conv(3, 8), "pick": Pick(), "b": conv(8, 6), "c": conv(6, 8), "d": conv(8, 2)}
    model = Net(forward, **members).eval()
    captured = capture(model, (image(),))
    first, second = (captured.root.children[at] for at in (1, 3))
    assert (first.path, second.path) == ("pick", "pick")
    assert (first.output.shape[1], second.output.shape[1]) == (8, 6)
    model = slimmed(model, image())
    assert (model.b.weight.shape[0], model.c.weight.shape[:2]) == (6, (4, 6))


def test_outputs_in_containers():
    def forward(m, x):
        out = m.several((m.a(x), m.b(x)))
        return m.d(m.c(out["both"][0] + out["both"][1] + out["pair"].first).relu())

    torch.manual_seed(0)
    members = {"a": conv(3, 8), "b": conv(3, 8), "several": Several(), "c": conv(8, 8), "d": conv(8, 2)}
    model = Net(forward, **members).eval()
    found = analyse(model, (image(),)).channel_map
    assert is_pinned(found, "a.weight", 0) and is_pinned(found, "b.weight", 0) and is_pinned(found, "c.weight", 1)
    model = slimmed(model, image())
    assert model.c.weight.shape[:2] == (4, 8)


def test_tensors_in_an_object_are_seen_to_go_in():
    class Holder:
        def __init__(self, tensors):
            self.tensors = tensors

    class Held(nn.Module):
        def forward(self, holder):
            return holder.tensors if holder.tensors.sum() > 0 else -holder.tensors

    def forward(m, x):
        y = m.a(x)
        return m.b(y) + m.c(m.held(Holder(y)))

    members = {"a": conv(3, 4), "b": conv(4, 2), "held": Held(), "c": conv(4, 2)}
    assert is_pinned(analyse(Net(forward, **members).eval(), (image(),)).channel_map, "a.weight", 0)


def test_a_layer_that_is_called_inside_and_belongs_elsewhere_is_kept():
    def forward(m, x):
        return m.d(m.c(m.borrowing(m.a(x))))

    torch.manual_seed(0)
    shared = conv(8, 8)
    members = {"a": conv(3, 8), "shared": shared, "borrowing": Borrowing(shared), "c": conv(8, 8), "d": conv(8, 2)}
    found = analyse(Net(forward, **members).eval(), (image(),)).channel_map
    assert reasons(found, "shared.weight", 0)[0].startswith("forward: its forward can't be recorded")


def test_its_own_parameters_stay_and_count_as_kept():
    model = autogate.prepare(around(Scale()), image())
    whole = autogate.summary(model)
    assert "3.layer" not in {layer.module for layer in whole.layers}
    with torch.no_grad():
        autogate.gates(model).alpha[:] = 0
    own = sum(parameter.numel() for parameter in model[3].parameters())
    left = autogate.summary(model).params
    slim = autogate.finalize(model, warn=False)
    assert slim[3].layer.weight.shape == (8, 8, 1, 1) and left > own
    assert whole.all_params == sum(parameter.numel() for parameter in around(Scale()).parameters())


def test_running_for_real_changes_nothing():
    model = around(nn.BatchNorm2d(8), nn.Dropout(), Scale(), Outside(), Drawing()).train()
    before = copy.deepcopy(model.state_dict())
    names = [set(vars(module)) for module in model.modules()]
    torch_state, python_state, numpy_state = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    example = image().requires_grad_()
    kept = example.detach().clone()
    captured = capture(model, (example,))
    assert set(captured.opaque) == {"5", "6"}  # numbers that are drawn are known while it is recorded
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert [set(vars(module)) for module in model.modules()] == names
    assert torch.equal(torch.get_rng_state(), torch_state) and random.getstate() == python_state
    assert np.array_equal(np.random.get_state()[1], numpy_state)
    assert torch.equal(example, kept) and example.grad is None


def test_heads_that_run_in_train_mode_only_are_seen_beside_it():
    class WithAuxiliary(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.pick, self.b, self.aux, self.last = conv(3, 8), Pick(), conv(8, 8), conv(8, 5), conv(8, 2)

        def forward(self, x):
            x = self.b(self.pick(self.a(x))).relu()
            return (self.last(x), self.aux(x)) if self.training else self.last(x)

    model = WithAuxiliary().eval()
    analysis = analyse(model, (image(),))
    assert [list(captured.opaque) for captured in analysis.captures] == [["pick"], ["pick"]]
    assert classes(analysis.channel_map, "aux.weight", 1) == list(range(8))
    assert slimmed(model, image()).aux.weight.shape[1] == 4


class OnlyInTraining(Pick):
    def forward(self, x):
        return super().forward(x) if self.training else x


def test_a_module_that_is_opaque_in_train_mode_only():
    model = Net(lambda m, x: m.b(m.pick(m.a(x))), a=conv(3, 4), pick=OnlyInTraining(), b=conv(4, 2))
    model.unused = conv(4, 4)
    analysis = analyse(model.eval(), (image(),))
    assert [list(captured.opaque) for captured in analysis.captures] == [[], ["pick"]]
    assert is_pinned(analysis.channel_map, "a.weight", 0)


def test_the_root_is_refused():
    with pytest.raises(CaptureError, match="depends on the values of a tensor"):
        capture(Pick(), (image(),))


def test_a_model_that_is_all_opaque_has_nothing_to_slim():
    with pytest.raises(AutogateError, match="0: its forward can't be recorded"):
        autogate.prepare(nn.Sequential(Scale()), image(8))


def test_an_input_that_fails_for_real_too_is_refused_with_its_module():
    with pytest.raises(CaptureError, match="fails on the example inputs") as error:
        capture(around(Pick(), conv(5, 8)), (image(),))
    assert str(error.value).startswith("4: ")


def test_what_fails_for_real_behind_it_is_what_is_told():
    with pytest.raises(CaptureError, match="fails on the example inputs: ZeroDivisionError") as error:
        capture(around(Pick(), Net(lambda m, x: x * (1 / 0))), (image(),))
    assert str(error.value).startswith("4: ") and "test_opaque.py" in str(error.value)


def test_the_rehearsal_gives_what_was_given_to_those_who_call_as_they_did():
    model = around(Several(), Pick())
    model[3].forward = lambda x: (x, -x)[int(x.sum() > 0)]
    opaque = capture(model, (image(),)).opaque
    with opaque_modules_stubbed(model, opaque):
        assert model[4](image(8).to("meta")).shape == (2, 8, 4, 4)
        with pytest.raises(RuntimeError, match="when it ran for real"):
            model[3](image(4).to("meta"))
    assert model[4](image(4)).shape == (2, 4, 4, 4)


def test_a_branch_that_goes_leaves_what_an_opaque_module_calls():
    def forward(m, x):
        x = m.borrowing(m.a(x).relu())
        return m.d(x + m.branch(x))

    torch.manual_seed(0)
    branch = nn.Sequential(conv(8, 8), nn.ReLU(), conv(8, 8))
    branch.append(conv(8, 8))
    members = {"a": conv(3, 8), "branch": branch, "borrowing": Borrowing(branch[3]), "d": conv(8, 2)}
    model = autogate.prepare(Net(forward, **members).eval(), image(), flops=1.0)
    with torch.no_grad():
        autogate.gates(model).alpha[:] = 0
    slim = autogate.finalize(model, warn=False)
    assert slim.branch[3].weight.shape[:2] == (8, 8)


def test_inputs_without_values_are_refused():
    with pytest.raises(CaptureError, match="depends on the values of a tensor") as error:
        capture(around(Pick()).to("meta"), (image().to("meta"),))
    assert str(error.value).startswith("3: ")


def test_an_error_that_the_forward_catches_is_not_the_one_that_is_told():
    assert list(capture(around(Careful()), (image(),)).opaque) == ["3"]
    with pytest.raises(CaptureError, match="depends on the values of a tensor") as error:
        capture(Careful(), (image(),))
    assert error.value.where == ""


def test_as_many_rows_as_the_values_ask_for():
    class Rows(nn.Module):
        """Those whose first entry is positive, and one that always is there."""

        def forward(self, x):
            return torch.cat([x[x[:, 0] > 0], x[:1]])

    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 6), Rows(), nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2)
    )
    model = autogate.prepare(model, torch.randn(16, 4))
    with torch.no_grad():
        autogate.gates(model).alpha[::2] = 0
        model[2].bias[0] = -10.0  # by now no row comes through but one
    slim = autogate.finalize(model, warn=False)
    assert [slim[at].out_features for at in (0, 2, 4, 6)] == [4, 6, 4, 2]


@pytest.mark.parametrize("middle", [Pick, Positive, Scale, Parent])
def test_a_file_of_it_loads(middle, tmp_path):
    slim, path = slimmed(around(middle()), image()), tmp_path / "slim.safetensors"
    autogate.save(slim, path)
    loaded = autogate.load(path, model=around(middle()))
    x = image(size=6)
    assert torch.equal(loaded(x), slim(x))


def test_a_slim_model_can_be_slimmed_again():
    again = slimmed(slimmed(around(Pick()), image()), image())
    assert [again[at].out_channels for at in (0, 2, 4)] == [2, 8, 2]
