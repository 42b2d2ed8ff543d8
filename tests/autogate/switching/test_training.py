"""Training several widths together: gradients, loops, compiled code, processes."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from torch import nn

from autogate import subnets
from autogate.switching.bank import SUBNETS
from tests.autogate.switching.nets import fused, small_net
from tests.processes import free_port, run_in_processes


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


@pytest.mark.slow
def test_autocast_accumulation_and_clipping(net):
    switchable, _, example = net
    switchable, example = switchable.float().train(), example.float()
    optimizer = torch.optim.AdamW(switchable.parameters(), lr=3e-2)
    labels = torch.tensor([0, 1, 2])
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        for _ in subnets.each(switchable):
            for part in (slice(0, 2), slice(1, 3)):
                with torch.autocast("cpu", torch.bfloat16):
                    loss = F.cross_entropy(switchable(example[part]).float(), labels[part])
                loss.backward()
        nn.utils.clip_grad_norm_(switchable.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
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


@pytest.mark.slow
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


@pytest.mark.slow
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
