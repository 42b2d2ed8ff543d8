"""Several widths in one network: exact, trained together, switched."""

from __future__ import annotations

import copy
import io
import pickle
import threading

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from torch import nn

import autogate
from autogate import subnets
from autogate.switching import SUBNETS
from tests.autogate.subnet_nets import closed, fused, small_net
from tests.processes import free_port, run_in_processes


@pytest.fixture
def net():
    model, example = small_net()
    switchable, slim = fused(model, example, (0.2, 0.5))
    return switchable, slim, example


def both(model, slim, x, train=False):
    """Outputs of a switchable and a slim model, with the same random numbers."""
    outputs = []
    for one in (model, slim):
        one.train(train)
        torch.manual_seed(0)
        outputs.append(one(x))
    return outputs


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("shortcuts", ["shared", "conv"])
@pytest.mark.parametrize("nested", [False, True])
def test_a_subnet_computes_and_learns_what_the_slim_model_does(train, shortcuts, nested):
    model, example = small_net()
    switchable, slim = fused(model, example, (0.3, 0.6), nested, shortcuts=shortcuts)
    for number, one in enumerate(slim):
        subnets.switch(switchable, number)
        mine, theirs = both(switchable, one, example[:2], train)
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-10)
        switchable.zero_grad()
        mine.square().sum().backward()
        theirs.square().sum().backward()
        subnet = switchable._modules[SUBNETS].subnet
        own = {tensor.name: tensor.at.own() for tensor in subnet.own}
        cuts = {part.name: part.cut for part in subnet.overlay.slices}
        shared = dict(switchable.named_parameters())
        for name, parameter in one.named_parameters():
            dense = own[name] if name in own else shared[name]
            gradient = dense.grad if name in own or name not in cuts else cuts[name](dense.grad)
            torch.testing.assert_close(gradient, parameter.grad, rtol=1e-9, atol=1e-10, msg=name)


def test_switching_leaves_every_bit(net):
    switchable, _, example = net
    before = {name: tensor.clone() for name, tensor in switchable.state_dict().items()}
    attributes = {path: dict(module.__dict__) for path, module in switchable.named_modules() if SUBNETS not in path}
    wanted = switchable(example)
    for number in (0, 1, 0, 2, 1, 2):
        subnets.switch(switchable, number)
        switchable(example)
    assert torch.equal(switchable(example), wanted)
    assert all(torch.equal(tensor, before[name]) for name, tensor in switchable.state_dict().items())
    for path, module in switchable.named_modules():
        if SUBNETS not in path and path:
            for name in ("in_channels", "out_channels", "groups", "num_features"):
                assert module.__dict__.get(name) == attributes[path].get(name)


def test_the_dense_model_is_the_largest_subnet_and_keeps_its_names(net):
    model, example = small_net()
    switchable, _, _ = net
    assert type(switchable) is type(model)
    dense = model.state_dict()
    mine = {name: tensor for name, tensor in switchable.state_dict().items() if not name.startswith(SUBNETS)}
    assert list(mine) == list(dense) and all(torch.equal(mine[name], dense[name]) for name in dense)
    assert torch.equal(switchable(example), model(example))


def test_gradients_of_all_subnets_add_up(net):
    switchable, _, example = net
    weight = next(p for name, p in switchable.named_parameters() if name.endswith("conv2.weight"))
    alone = []
    for number in range(3):
        switchable.zero_grad()
        with subnets.active(switchable, number):
            switchable(example).sum().backward()
        alone.append(weight.grad.clone())
    switchable.zero_grad()
    for _ in subnets.each(switchable):
        switchable(example).sum().backward()
    torch.testing.assert_close(weight.grad, sum(alone))


def test_one_slice_takes_several_backward_passes(net):
    switchable, _, example = net
    subnets.switch(switchable, 0)
    first, second = switchable(example[:1]).sum(), switchable(example[1:]).sum()
    first.backward()
    second.backward()
    summed = [p.grad.clone() for p in switchable.parameters() if p.grad is not None]
    switchable.zero_grad()
    (switchable(example[:1]).sum() + switchable(example[1:]).sum()).backward()
    torch.testing.assert_close([p.grad for p in switchable.parameters() if p.grad is not None], summed)


def test_slices_follow_the_weights(net):
    switchable, _, example = net
    subnets.switch(switchable, 0)
    with torch.no_grad():
        before = switchable(example)
        for parameter in switchable.parameters():
            parameter.mul_(1.1)
        after = switchable(example)
    assert not torch.equal(before, after)
    assert torch.equal(after, subnets.extract(switchable, 0)(example))


def test_training_moves_what_a_subnet_has_and_nothing_else(net):
    switchable, _, example = net
    optimizer = torch.optim.SGD(switchable.parameters(), lr=0.1)
    weight = next(p for name, p in switchable.named_parameters() if name.endswith("conv2.weight"))
    before = weight.detach().clone()
    subnets.switch(switchable, 0)
    switchable.train()(example).square().sum().backward()
    optimizer.step()
    part = next(one for one in switchable._modules[SUBNETS].subnet.overlay.slices if one.places[0].own() is weight)
    moved = (weight != before).double()
    assert moved.any()
    assert torch.equal(moved, part.spread(torch.ones_like(part.cut(weight)), weight.shape) * moved)


@pytest.mark.parametrize("way", ["copy", "pickle", "save"])
@pytest.mark.parametrize("grad", [False, True])
def test_copies_are_switchable_themselves(net, way, grad):
    switchable, _, example = net
    subnets.switch(switchable, 0)
    with torch.set_grad_enabled(grad):
        wanted = switchable(example)
    if way == "copy":
        copied = copy.deepcopy(switchable)
    elif way == "pickle":
        copied = pickle.loads(pickle.dumps(switchable))
    else:
        torch.save(switchable, buffer := io.BytesIO())
        copied = torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)
    assert torch.equal(copied(example), wanted)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.zero_()
    subnets.switch(copied, 1)
    subnets.switch(copied, 0)
    assert not copied(example).any() and torch.equal(switchable(example), wanted)
    assert subnets.status(switchable).rows[0].active


def test_a_checkpoint_holds_all_subnets(net):
    switchable, _, example = net
    for active in subnets.each(switchable.train()):
        switchable(example + active.number)
    other, _ = fused(*small_net(), (0.2, 0.5))
    other.load_state_dict(switchable.state_dict())
    for number in range(3):
        subnets.switch(switchable, number)
        subnets.switch(other, number)
        assert torch.equal(switchable.eval()(example), other.eval()(example))


def test_gradient_checkpointing_reaches_the_shared_weights(net):
    switchable, _, example = net
    subnets.switch(switchable.train(), 0)
    gradients = []
    for saving in (False, True):
        switchable.set_grad_checkpointing(saving)
        switchable.zero_grad()
        switchable(example).square().sum().backward()
        gradients.append([p.grad for p in switchable.parameters() if p.grad is not None])
    torch.testing.assert_close(*gradients)


def test_autocast_accumulation_and_clipping(net):
    switchable, _, example = net
    switchable, example = switchable.float().train(), example.float()
    optimizer = torch.optim.AdamW(switchable.parameters(), lr=1e-2)
    labels = torch.tensor([0, 1, 2])
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        for _ in subnets.each(switchable):
            for part in (slice(0, 2), slice(1, 3)):
                with torch.autocast("cpu", torch.bfloat16):
                    loss = F.cross_entropy(switchable(example[part]).float(), labels[part])
                loss.backward()
        nn.utils.clip_grad_norm_(switchable.parameters(), 1.0)
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < 0.5 * losses[0]


def test_an_average_of_the_weights_holds_the_norms_of_all(net):
    switchable, _, example = net
    average = torch.optim.swa_utils.AveragedModel(switchable, use_buffers=True)
    for active in subnets.each(switchable.train()):
        switchable(example * (active.number + 1))
    average.update_parameters(switchable)
    average.update_parameters(switchable)
    subnets.switch(average.module, 0)
    subnets.switch(switchable, 0)
    assert torch.equal(average.module.eval()(example), switchable.eval()(example))


@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
def test_compiled_code_follows_the_switch(name):
    switchable, _ = fused(*small_net(name, 160 if name == "test_vit" else 32), (0.2, 0.6))
    example = torch.randn(2, 3, *[160 if name == "test_vit" else 32] * 2, dtype=torch.float64)
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(switchable, backend=counter)
    with torch.no_grad():
        for number in (0, 1, 2, 0, 1, 2):
            subnets.switch(compiled, number)
            assert torch.equal(compiled(example), switchable(example))
    assert counter.frame_count == 3


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


def test_an_extracted_subnet_is_a_slim_model(net, tmp_path):
    switchable, slim, example = net
    for _ in subnets.each(switchable.train()):
        switchable(example)
    switchable.eval()
    for number, one in enumerate(slim):
        alone = subnets.extract(switchable, number)
        shapes = {name: p.shape for name, p in alone.named_parameters()}
        assert shapes == {name: p.shape for name, p in one.named_parameters()}
        with subnets.active(switchable, number):
            assert torch.equal(alone(example), switchable(example))
        autogate.save(alone, tmp_path / "one.safetensors")
        assert torch.equal(autogate.load(tmp_path / "one.safetensors")(example), alone(example))
    whole = subnets.extract(switchable, "full")
    assert torch.equal(whole(example), switchable(example)) and SUBNETS not in whole._modules


def test_recalibrate_is_for_the_active_subnet(net):
    switchable, _, example = net
    state = {name: tensor.clone() for name, tensor in switchable.state_dict().items()}
    subnets.switch(switchable, 0)
    autogate.recalibrate(switchable, [example, example + 1])
    changed = {name for name, tensor in switchable.state_dict().items() if not torch.equal(tensor, state[name])}
    assert changed and all(name.startswith(f"{SUBNETS}.0.") for name in changed)


def test_norms_may_share_their_affine_parameters():
    model, example = small_net()
    found = subnets.of(closed(model, example, 0.4, 0))
    switchable = subnets.fuse(model, found, norms="statistics")
    own = [name for name in switchable.state_dict() if name.startswith(SUBNETS)]
    assert own and all(
        name.rpartition(".")[2] in ("running_mean", "running_var", "num_batches_tracked") for name in own
    )


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


class Slow(nn.Module):
    """A network whose forward can be stopped in the middle."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 4, 3)
        self.middle = lambda: None

    def forward(self, x):
        x = self.conv1(x)
        self.middle()
        return self.conv2(x.relu())


def test_no_forward_sees_two_subnets():
    model, example = Slow(), torch.randn(2, 3, 8, 8)
    switchable = subnets.fuse(model, subnets.of(closed(model, example, 0.5, 0)))
    inside, go_on = threading.Event(), threading.Event()
    switchable.middle = lambda: (inside.set(), go_on.wait(20))
    thread = threading.Thread(target=switchable, args=(example,))
    thread.start()
    assert inside.wait(20)
    with pytest.raises(autogate.AutogateError, match="would see two subnets"):
        subnets.switch(switchable, 0)
    go_on.set()
    thread.join()
    assert subnets.switch(switchable, 0).name != "full"


def test_after_a_failed_forward_it_can_be_switched(net):
    switchable, _, example = net
    with pytest.raises(RuntimeError):
        switchable(example[:, :2])
    subnets.switch(switchable, 0)


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
        (lambda: subnets.fuse(model, subnets.of(closed(model, example, 0.5, 0)), norms="shared"), "norms is 'shared'"),
    ):  # fmt: skip
        with pytest.raises(autogate.AutogateError, match=f"(?s){message}"):
            call()


def test_structures_of_another_model_are_refused_and_nothing_is_left():
    model, example = small_net("test_resnet")
    other, _ = small_net("test_efficientnet")
    found = subnets.of(closed(model, example, 0.5, 0))
    before = {path: set(module.__dict__) for path, module in other.named_modules()}
    with pytest.raises(autogate.AutogateError):
        subnets.fuse(other, found)
    assert before == {path: set(module.__dict__) for path, module in other.named_modules()}


def test_two_of_one_name_are_refused():
    model, example = small_net()
    prepared = closed(model, example, 0.5, 0)
    with pytest.raises(autogate.AutogateError, match="two subnets are called 'a'"):
        subnets.fuse(model, subnets.of(prepared, prepared, names=["a", "a"]))


@pytest.mark.parametrize("verb", [autogate.prepare, autogate.finalize, lambda model: autogate.save(model, "x")])
def test_other_verbs_refuse_a_switchable_model(net, verb):
    switchable, _, _ = net
    with pytest.raises(autogate.AutogateError, match="subnets"):
        verb(switchable)


def _train_distributed(rank: int, world: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    switchable, _ = fused(*small_net(), (0.2, 0.5))
    wrapped: nn.Module = switchable
    if world > 1:
        torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
        wrapped = nn.parallel.DistributedDataParallel(switchable, find_unused_parameters=True, broadcast_buffers=False)
    optimizer = torch.optim.SGD(switchable.parameters(), lr=0.01)
    switchable.eval()  # statistics of a batch norm differ between halves of a batch
    for step in range(3):
        images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        optimizer.zero_grad()
        for _ in subnets.each(wrapped):
            part = images if world == 1 else images[2 * rank : 2 * rank + 2]
            wrapped(part).square().mean().backward()
        optimizer.step()
    torch.save(switchable.state_dict(), f"{folder}/{world}_{rank}.pt")
    if world > 1:
        torch.distributed.destroy_process_group()


def test_two_processes_train_as_one(tmp_path):
    _train_distributed(0, 1, 0, str(tmp_path))
    run_in_processes(_train_distributed, 2, 2, free_port(), str(tmp_path))
    alone = torch.load(tmp_path / "1_0.pt")
    first, second = (torch.load(tmp_path / f"2_{rank}.pt") for rank in range(2))
    start = fused(*small_net(), (0.2, 0.5))[0].state_dict()
    assert any(not torch.equal(alone[name], start[name]) for name in alone if name.startswith(SUBNETS))
    for name, tensor in alone.items():
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], tensor, rtol=1e-9, atol=1e-11)
