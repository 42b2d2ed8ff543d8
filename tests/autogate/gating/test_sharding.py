"""FSDP2: each process holds a part of the gated kernels."""

import os

import pytest
import torch
from torch import nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import autogate
from tests.processes import free_port, run_in_processes

WORLD, STEPS, BATCH = 2, 20, 8


class Net(nn.Module):
    """No batch statistics, so a batch may be divided; odd widths, so shards are uneven, and one is empty.

    Convolutions are gated along dimension 1, the transposed one along 0, which is the one that is sharded.
    """

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 15, 3, padding=1)
        self.block = nn.Sequential(nn.Conv2d(15, 11, 3, padding=1), nn.ReLU(), nn.Conv2d(11, 15, 1))
        self.up = nn.ConvTranspose2d(15, 9, 2, stride=2)
        self.head, self.score = nn.Linear(9, 4), nn.Conv2d(9, 1, 1)

    def forward(self, x):
        x = self.stem(x).relu()
        x = self.up((x + self.block(x)).relu()).relu()
        return self.head(x.mean((2, 3))) + self.score(x).mean((2, 3))


EXAMPLE = torch.linspace(-1, 1, 2 * 3 * 6 * 6).view(2, 3, 6, 6)


def prepared(**options) -> nn.Module:
    torch.manual_seed(0)
    return autogate.prepare(Net(), EXAMPLE, flops=0.5, steps=STEPS, **options)


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9, weight_decay=1e-3)


def train(model, optimizer, steps: range, rank: int = 0, world: int = 1, after=lambda: None) -> None:
    """This process's part of every global batch; now and then an evaluation, which leaves the root gathered."""
    for step in steps:
        images = torch.randn(BATCH, 3, 6, 6, generator=torch.Generator().manual_seed(step))
        labels = (images.mean((1, 2, 3)) > 0).long()
        if step % 5 == 0:
            with torch.no_grad():
                model(images)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images[rank::world]), labels[rank::world]).backward()
        optimizer.step()
        after()


def sharded(**options) -> nn.Module:
    model = prepared(**options)
    fully_shard(model.block)
    return fully_shard(model)


def gathered(model: nn.Module) -> dict[str, torch.Tensor]:
    return {
        name: (value.full_tensor() if isinstance(value, DTensor) else value).clone()
        for name, value in model.state_dict().items()
    }


def assert_same(state: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    for name, value in wanted.items():
        assert torch.equal(state[name], value), name


def _run(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.distributed.init_process_group("gloo", rank=rank, world_size=WORLD)
    model = sharded()
    assert isinstance(model.up.weight, DTensor)
    optimizer = optimizer_of(model)
    train(model, optimizer, range(STEPS), rank, WORLD)
    end = gathered(model)
    torch.save(end, f"{folder}/{rank}.pt")
    assert autogate.gates(model).progress().settled

    _a_loop_without_hooks_takes_the_same_course(rank, end)
    _a_resumed_run_ends_the_same(rank, end, folder)
    _alphas_set_by_hand_are_folded(rank)
    _dead_columns_stay_zero_whatever_the_optimizer(rank)
    _a_gathered_model_is_finalized(model, end)
    torch.distributed.destroy_process_group()


def _a_loop_without_hooks_takes_the_same_course(rank: int, end: dict[str, torch.Tensor]) -> None:
    model = sharded(hooks=False)
    optimizer = optimizer_of(model)
    train(model, optimizer, range(STEPS), rank, WORLD, lambda: autogate.step(model, lr=0.3))
    assert_same(gathered(model), end)


def _a_resumed_run_ends_the_same(rank: int, end: dict[str, torch.Tensor], folder: str) -> None:
    """From a checkpoint of the middle, full or in shards, on a model whose gates have never moved."""
    first = sharded()
    optimizer = optimizer_of(first)
    train(first, optimizer, range(STEPS // 2), rank, WORLD)
    full = StateDictOptions(full_state_dict=True)
    states = get_state_dict(first, optimizer, options=full)
    checkpoint.save(_named(first, optimizer), checkpoint_id=f"{folder}/middle")
    for hooks, options in ((True, full), (False, full), (True, None)):
        second = sharded(hooks=hooks)
        optimizer = optimizer_of(second)
        if not options:
            read = _named(second, optimizer)
            checkpoint.load(read, checkpoint_id=f"{folder}/middle")
            states = read["model"], read["optimizer"]
        set_state_dict(
            second, optimizer, model_state_dict=states[0], optim_state_dict=states[1], options=options
        )  # fmt: skip
        after = (lambda: None) if hooks else (lambda model=second: autogate.step(model, lr=0.3))
        train(second, optimizer, range(STEPS // 2, STEPS), rank, WORLD, after)
        assert_same(gathered(second), end)


def _named(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, dict]:
    """This process's shards, to be written or read into."""
    return dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))


@torch.no_grad()
def _alphas_set_by_hand_are_folded(rank: int) -> None:
    plain, model = prepared(), sharded()
    for _ in range(2):  # the second time the root is still gathered from the forward before
        for each in (plain, model):
            bank = autogate.gates(each)
            bank.alpha[::5] = 0
            bank.alpha[1::5] *= 0.7
        torch.testing.assert_close(model(EXAMPLE), plain(EXAMPLE), rtol=1e-5, atol=1e-6)
        state = gathered(model)
        for name, value in plain.state_dict().items():
            torch.testing.assert_close(state[name], value, rtol=1e-6, atol=0)


def _dead_columns_stay_zero_whatever_the_optimizer(rank: int) -> None:
    """Foreach and fused steps leave no trace in a sharded parameter's version."""
    for way in ("foreach", "fused"):
        model = sharded()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1, **{way: True})
        train(model, optimizer, range(STEPS + 5), rank, WORLD)
        bank, state = autogate.gates(model), gathered(model)
        assert (~bank.live).any() and (bank.live & (bank.folded < 1)).any()
        for side in bank.channel_map.gated:
            dead = torch.cat([~bank.live, torch.zeros(1, dtype=torch.bool)])[bank.channel_map.classes[side]]
            assert state[side.tensor].index_select(side.dim, dead.nonzero().flatten()).abs().sum() == 0


@torch.no_grad()
def _a_gathered_model_is_finalized(model: nn.Module, end: dict[str, torch.Tensor]) -> None:
    gated = model(EXAMPLE)
    with pytest.raises(autogate.AutogateError, match="full_state_dict"):
        autogate.finalize(model)
    with pytest.raises(autogate.AutogateError, match="fully_shard"):
        autogate.prepare(fully_shard(Net()), EXAMPLE)
    whole = prepared()
    whole.load_state_dict(end)
    slim = autogate.finalize(whole)
    torch.testing.assert_close(slim(EXAMPLE), gated, rtol=1e-5, atol=1e-6)
    assert slim.block[0].in_channels < 15 or slim.block[0].out_channels < 11


@pytest.mark.slow
def test_sharded_kernels_learn_the_gates_of_one_process(tmp_path):
    model = prepared()
    train(model, optimizer_of(model), range(STEPS))
    run_in_processes(_run, WORLD, free_port(), str(tmp_path))
    states = [torch.load(tmp_path / f"{rank}.pt") for rank in range(WORLD)]
    assert_same(*states)
    alone = model.state_dict()
    assert alone["autogate.dead"].any()
    assert torch.equal(states[0]["autogate.dead"] > 0, alone["autogate.dead"] > 0)
    torch.testing.assert_close(states[0]["autogate.alpha"], alone["autogate.alpha"], rtol=1e-3, atol=1e-4)
