"""The verbs of switchable networks."""

from __future__ import annotations

import copy

import pytest
import torch
import torch._dynamo.testing
from torch import nn

import autogate
from autogate import subnets
from autogate.switching import SUBNETS
from tests.autogate.switching.nets import closed, fused, small_net


def test_in_place_distillation_has_the_largest_s_answer(net):
    switchable, _, example = net
    with torch.no_grad():
        wanted = switchable(example)
    for active in subnets.each(switchable):
        output = switchable(example)
        if active.number == 2:
            assert active.teacher is None
        else:
            assert torch.equal(active.teacher, wanted) and not active.teacher.requires_grad
            assert not torch.equal(output, wanted)
    assert switchable._modules[SUBNETS].teacher is None


def test_the_sandwich_has_both_ends():
    switchable, _ = fused(*small_net(), (0.1, 0.2, 0.3, 0.4, 0.5))
    drawn = [[one.number for one in subnets.each(switchable, "sandwich", between=2, seed=seed)] for seed in range(9)]
    assert all(len(one) == 4 and one[0] == 5 and one[-1] == 0 and sorted(one, reverse=True) == one for one in drawn)
    assert len(set(map(tuple, drawn))) > 1
    assert drawn[3] == [one.number for one in subnets.each(switchable, "sandwich", between=2, seed=3)]
    assert [one.number for one in subnets.each(switchable)] == [5, 4, 3, 2, 1, 0]


def test_after_a_broken_loop_the_former_subnet_is_active(net):
    switchable, _, _ = net
    subnets.switch(switchable, 1)
    for _ in subnets.each(switchable):
        break
    assert [row.active for row in subnets.status(switchable).rows] == [False, True, False]


def test_a_subnet_is_taken_by_number_name_and_budget(net):
    switchable, _, _ = net
    rows = [row.structure for row in subnets.status(switchable).rows]
    share = rows[1].shares["FLOPs"]
    assert subnets.switch(switchable, -1).name == "full"
    assert subnets.switch(switchable, rows[0].name) == rows[0]
    assert subnets.switch(switchable, flops=share + 0.01) == rows[1]
    assert subnets.switch(switchable, share - 0.01) == rows[0]
    assert subnets.switch(switchable, flops=1.0) == rows[2]
    assert subnets.switch(switchable, params=rows[1].shares["parameters"]) == rows[1]
    with subnets.active(switchable, 0) as active:
        assert active == rows[0]
    assert subnets.switch(switchable, flops=1.0, params=rows[0].shares["parameters"]) == rows[0]


def test_recalibrate_is_for_the_active_subnet(net):
    switchable, _, example = net
    state = {name: tensor.clone() for name, tensor in switchable.state_dict().items()}
    subnets.switch(switchable, 0)
    autogate.recalibrate(switchable, [example, example + 1])
    changed = {name for name, tensor in switchable.state_dict().items() if not torch.equal(tensor, state[name])}
    assert changed and all(name.startswith(f"{SUBNETS}.0.") for name in changed)


def test_find_trains_a_copy_for_each_budget():
    model, example = small_net(dtype=torch.float32)
    seen = []

    def train(gated):
        seen.append(gated)
        with torch.no_grad():
            autogate.gates(gated).alpha[:: len(seen) + 1] = 0

    before = copy.deepcopy(model.state_dict())
    found = subnets.find(model, example, flops=(0.3, 0.6), train=train, steps=10)
    assert [one.name for one in found.structures] == ["0.3", "0.6"]
    assert [autogate.gates(one).progress().targets["FLOPs"] for one in seen] == [0.3, 0.6]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert "0.3" in str(found)


def test_misuse_is_refused_by_name(net):
    switchable, _, example = net
    model, _ = small_net()
    other = closed(model, example, 0.5, 0, shortcuts="conv")
    for call, message in (
        (lambda: subnets.switch(model, 0), "no subnets.*fuse"),
        (lambda: subnets.switch(switchable, "fulll"), "called 'fulll'.*full"),
        (lambda: subnets.switch(switchable, 7), "no subnet 7"),
        (lambda: subnets.switch(switchable), "no subnet is named"),
        (lambda: subnets.switch(switchable, flops=1e-4), "no subnet fits 0.0% .*The smallest"),
        (lambda: subnets.each(switchable, "alll"), "rule is 'alll'"),
        (lambda: subnets.fuse(switchable, subnets.of(closed(model, example, 0.5, 0))), "has subnets already"),
        (lambda: subnets.of(), "0 models"),
        (lambda: subnets.of(model), "no gates"),
        (lambda: subnets.of(closed(model, example, 0.5, 0), other), "other arguments"),
        (lambda: subnets.find(model, example, flops=(), train=print), "no share"),
        (lambda: subnets.find(model, example, flops=(0.5,)), "by training or by a criterion"),
        (lambda: subnets.find(model, example, flops=(0.5,), train=print, loss=print), "are for a criterion"),
        (lambda: subnets.fuse(model, subnets.of(closed(model, example, 0.5, 0)), norms="shared"), "norms is 'shared'"),
    ):  # fmt: skip
        with pytest.raises(autogate.AutogateError, match=f"(?s){message}"):
            call()


@pytest.mark.parametrize(
    "verb",
    [
        autogate.prepare,
        autogate.finalize,
        lambda model: autogate.to_onnx(model, "x.onnx"),
        lambda model: autogate.to_torch_export(model, "x.pt2"),
    ],
)
def test_other_verbs_refuse_a_switchable_model(net, verb):
    switchable, _, _ = net
    with pytest.raises(autogate.AutogateError, match="subnets"):
        verb(switchable)


def test_models_that_take_several_ways_have_subnets():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 2)

        def forward(self, x, mask=None):
            y = self.first(x)
            first, second = y[:, :4], y[:, 4:]
            y = torch.cat([first if mask is None else first * mask, second], 1)
            return self.second(y.relu())

    torch.manual_seed(0)
    x, mask = torch.randn(3, 4), torch.tensor([[1.0], [0.0], [2.0]])
    model = Masked()
    prepared = (
        closed(model, autogate.Examples(x.clone(), (x.clone(), mask.clone())), share, 0) for share in (0.4, 0.7)
    )
    switchable = subnets.fuse(model, subnets.of(*prepared))
    slim = [subnets.extract(switchable, number) for number in (0, 1)]
    for number, one in enumerate(slim):
        subnets.switch(switchable, number)
        for call in ((x,), (x, mask), (x[:1],), (x[:1], mask[2:])):
            torch.testing.assert_close(switchable(*call), one(*call))


def test_a_criterion_finds_nested_structures_and_the_order_of_death():
    model, example = small_net(dtype=torch.float32)
    found = subnets.find(model, example, flops=(0.2, 0.4), by="l1", allocation="uniform")
    assert [one.name for one in found.structures] == ["0.2", "0.4"]
    narrow, wide = ({side: set(kept.kept) for kept in one.kept for side in kept.sides} for one in found.structures)
    assert wide and all(narrow[side] <= kept for side, kept in wide.items())
    early = {one.side: one.indices for one in found.structures[1].deaths}
    late = {one.side: one.indices for one in found.structures[0].deaths}
    assert len(early) > 3 and all(late[side][: len(indices)] == indices for side, indices in early.items())


def test_a_subnet_is_taken_by_its_time(net, monkeypatch):
    switchable, _, _ = net
    timed = []

    def time_model(model, layers, inputs):
        timed.append(model._modules[SUBNETS].active)
        return {0: 0.2, 1: 0.5, 2: 1.0}[timed[-1]], {}

    monkeypatch.setattr("autogate.switching.latency.time_model", time_model)
    names = [row.structure.name for row in subnets.status(switchable).rows]
    assert subnets.switch(switchable, latency=0.6).name == names[1]
    assert subnets.switch(switchable, latency=0.3).name == names[0]
    assert sorted(timed) == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert [row.seconds for row in subnets.status(switchable).rows] == [0.2, 0.5, 1.0]
    assert "500.0 ms" in str(subnets.status(switchable))
    with pytest.raises(autogate.AutogateError, match=r"no subnet fits 10\.0% of the latency"):
        subnets.switch(switchable, latency=0.1)
