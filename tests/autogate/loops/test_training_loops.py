"""The loops people have: optimizers, schedules, averages, gradient checkpointing, no hooks, several processes."""

import contextlib
import copy
import os
import socket
import warnings

import pytest
import timm
import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV2, ModelEmaV3
from torch import nn
from torch.distributed.algorithms.join import Join
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import autogate
from tests.autogate.loops.small_nets import EXAMPLE, Residual, batches


def net(**options) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    example = torch.randn(2, 3, 32, 32)
    model = timm.create_model("test_resnet", num_classes=4)
    return autogate.prepare(model, example, **options), example


def loss_of(model: nn.Module, seed: int, size: int = 8) -> torch.Tensor:
    images = torch.randn(size, 3, 32, 32, generator=torch.Generator().manual_seed(seed))
    return nn.functional.cross_entropy(model(images), (images.mean((1, 2, 3)) > 0).long())


@torch.no_grad()
def output(model: nn.Module, example: torch.Tensor) -> torch.Tensor:
    return model.eval()(example)


def assert_exact(model: nn.Module, example: torch.Tensor) -> None:
    gated = output(model, example)
    torch.testing.assert_close(output(autogate.finalize(model, warn=False), example), gated, rtol=1e-5, atol=1e-5)


OPTIMIZERS = {
    "sgd": 0.05, "momentum": 0.05, "nesterov": 0.05, "adam": 1e-3, "adamw": 1e-3, "rmsprop": 1e-3, "lamb": 5e-3,
    "lion": 1e-4, "adan": 1e-3,
}  # fmt: skip
FUSED = ("sgd", "momentum", "nesterov", "adam", "adamw")


def optimizer_of(model: nn.Module, name: str, **way: bool) -> torch.optim.Optimizer:
    """As timm makes it, with two parameter groups; its "sgd" is Nesterov's, ours the plain one."""
    kind = {"opt": "momentum", "momentum": 0.0} if name == "sgd" else {"opt": name}
    return create_optimizer_v2(model, **kind, lr=OPTIMIZERS[name], weight_decay=1e-4, **way)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_timms_optimizers_meet_the_budget(name):
    """With timm's scheduler, which warms up from next to nothing."""
    steps = 80
    model, example = net(flops=0.5, steps=steps)
    optimizer = optimizer_of(model, name)
    schedule = CosineLRScheduler(optimizer, t_initial=steps, warmup_t=5, warmup_lr_init=1e-7, t_in_epochs=False)
    for step in range(steps):
        model.train()
        optimizer.zero_grad()
        loss_of(model, step).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step_update(step + 1)
    progress = autogate.gates(model).progress()
    assert progress.step == steps and progress.settled
    assert abs(progress.shares["FLOPs"] - 0.5) <= 0.01
    assert_exact(model, example)


def trained_by(name: str, steps: int = 40, flops: float = 0.5, hooks: bool = True, **way: bool) -> nn.Module:
    """A small network after some steps of an optimizer; without hooks, its loop steps the gates."""
    torch.manual_seed(0)
    model = autogate.prepare(Residual(), EXAMPLE, flops=flops, steps=40, hooks=hooks)
    optimizer = optimizer_of(model, name, **way)
    for images, labels in batches(steps, size=8):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
        if not hooks:
            autogate.step(model, lr=optimizer.param_groups[0]["lr"])
    return model


@pytest.mark.parametrize(
    ("name", "way"), [*((name, "foreach") for name in OPTIMIZERS), *((name, "fused") for name in FUSED)]
)
def test_foreach_and_fused_steps_leave_the_gates_of_the_plain_one(name, way):
    bank, plain = (autogate.gates(trained_by(name, **options)) for options in ({way: True}, {"foreach": False}))
    assert (~bank.live).any() and torch.equal(bank.live, plain.live)
    torch.testing.assert_close(bank.alpha, plain.alpha, rtol=1e-3, atol=1e-5)


def test_alphas_first_step_is_the_same_under_every_optimizer():
    """Its rate is its own: of the kernels' only the part of their peak counts."""
    first, *others = (autogate.gates(trained_by(name, steps=1, flops=1.0)).alpha for name in OPTIMIZERS)
    assert (first != 1).any()
    assert all(torch.equal(alpha, first) for alpha in others)


def train(model: nn.Module, steps: int, after=lambda: None, lr: float = 0.05) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    for step in range(steps):
        model.train()
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()
        after()


AVERAGES = {
    "AveragedModel": AveragedModel,
    "AveragedModel by EMA": lambda model: AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9)),
    "AveragedModel with buffers": lambda model: AveragedModel(model, use_buffers=True),
    "AveragedModel by EMA with buffers": lambda model: AveragedModel(
        model, use_buffers=True, multi_avg_fn=get_ema_multi_avg_fn(0.9)
    ),
    "ModelEmaV2": lambda model: ModelEmaV2(model, decay=0.9),
    "ModelEmaV3": lambda model: ModelEmaV3(model, decay=0.9),
    "ModelEmaV3, slow": lambda model: ModelEmaV3(model, decay=0.98),
}


@pytest.mark.parametrize("name", AVERAGES)
def test_what_is_dead_in_the_model_is_dead_in_its_average(name):
    model, example = net(flops=0.5, steps=60)
    average = AVERAGES[name](model)
    update = getattr(average, "update_parameters", None) or average.update
    train(model, 60, lambda: update(model))
    bank, theirs = autogate.gates(model), autogate.gates(average.module)
    assert (~bank.live).any()
    assert torch.equal(theirs.live, bank.live)
    output(average.module, example)
    for side in theirs.channel_map.gated:
        weight = average.module.get_parameter(side.tensor)
        dead = torch.cat([~bank.live, torch.zeros(1, dtype=torch.bool)])[theirs.channel_map.classes[side]]
        assert weight.index_select(side.dim, dead.nonzero().flatten()).abs().sum() == 0
    assert_exact(average.module, example)
    assert_exact(model, example)


@pytest.mark.parametrize("name", AVERAGES)
def test_an_average_computes_with_the_averaged_kernels(name):
    """Averages of alpha, epsilon and gates don't fit each other; the kernels are averaged, and not to be scaled."""
    model, example = net(flops=0.5, steps=40)
    average = AVERAGES[name](model)
    update = getattr(average, "update_parameters", None) or average.update
    train(model, 50, lambda: update(model))
    bank, state = autogate.gates(model), {key: value.clone() for key, value in average.module.state_dict().items()}
    assert (~bank.live).any()
    plain = timm.create_model("test_resnet", num_classes=4)
    plain.load_state_dict({key: value for key, value in state.items() if not key.startswith("autogate.")})
    with torch.no_grad():
        for side in bank.channel_map.gated:
            dead = torch.cat([~bank.live, torch.zeros(1, dtype=torch.bool)])[bank.channel_map.classes[side]]
            plain.get_parameter(side.tensor).index_fill_(side.dim, dead.nonzero().flatten(), 0)
    loaded, _ = net(flops=0.5, steps=40)
    loaded.load_state_dict(state)
    for averaged in (average.module, loaded):
        torch.testing.assert_close(output(averaged, example), output(plain, example), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_loop_without_hooks_takes_the_same_course(name):
    hooked, called = trained_by(name), trained_by(name, hooks=False)
    state = called.state_dict()
    for key, value in hooked.state_dict().items():
        assert torch.equal(value, state[key]), key
    assert (~autogate.gates(called).live).any()
    assert_exact(called, EXAMPLE)


@pytest.mark.parametrize("fused", [False, True])
def test_without_hooks_a_step_that_the_scaler_skips_is_left_out(fused):
    """The loop sees by the scale that falls whether the step was taken."""

    def trained(hooks: bool) -> autogate.GateBank:
        torch.manual_seed(0)
        model = autogate.prepare(Residual(), EXAMPLE, flops=0.5, steps=30, hooks=hooks)
        optimizer = torch.optim.AdamW(model.parameters(), 1e-3, fused=fused)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        for step, (images, labels) in enumerate(batches(31, size=8)):
            optimizer.zero_grad()
            scaler.scale(nn.functional.cross_entropy(model(images), labels)).backward()
            if step == 9:
                model.stem[0].weight.grad[0] = float("inf")
            before = scaler.get_scale()
            scaler.step(optimizer)
            scaler.update()
            if not hooks and scaler.get_scale() >= before:
                autogate.step(model, lr=1e-3)
        assert scaler.get_scale() == 512
        return autogate.gates(model)

    hooked, called = trained(hooks=True), trained(hooks=False)
    assert called.progress().step == 30 and called.progress().settled
    assert torch.equal(called.alpha, hooked.alpha)


def test_without_hooks_no_optimizer_moves_a_gate():
    model, _ = net(steps=10, hooks=False)
    train(copy.deepcopy(model), 2)
    train(model, 2)
    assert autogate.gates(model).progress().step == 0


def test_the_step_of_a_model_whose_gates_move_by_themselves_is_refused():
    model, _ = net(steps=10)
    with pytest.raises(autogate.AutogateError, match="already move"):
        autogate.step(model, lr=0.1)


def test_gradient_checkpointing_changes_nothing():
    plain, _ = net(flops=0.5, steps=20)
    saving, example = net(flops=0.5, steps=20)
    saving.set_grad_checkpointing(True)
    for model in (plain, saving):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            train(model, 20)
    torch.testing.assert_close(autogate.gates(saving).alpha, autogate.gates(plain).alpha, rtol=1e-3, atol=1e-5)
    assert_exact(saving, example)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad", "ignore:torch.utils.checkpoint")
@pytest.mark.parametrize("name", ["test_vit", "test_efficientnet", "test_convnext"])
def test_a_model_that_saves_memory_already_is_prepared(name):
    """Its own forward is traced, and PyTorch's C++ is given what passes through the checkpoints."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=4, **({"img_size": 32} if "vit" in name else {})).eval()
    plain = autogate.prepare(copy.deepcopy(model), example := torch.randn(2, 3, 32, 32))
    model.set_grad_checkpointing(True)
    model = autogate.prepare(model, example)
    assert autogate.gates(model).channel_map.checksum() == autogate.gates(plain).channel_map.checksum()
    with torch.no_grad():
        autogate.gates(model).alpha[::2] = 0
    loss_of(model.train(), 0).backward()
    assert_exact(model, example)


@pytest.mark.parametrize("clip", ["norm", "value"])
def test_accumulation_autocast_clipping_and_channels_last(clip):
    model, example = net(flops=0.5, steps=40)
    model = model.to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for step in range(40):
        model.train()
        optimizer.zero_grad()
        for part in range(2):
            with torch.autocast("cpu", torch.bfloat16):
                loss = loss_of(model, 2 * step + part, size=4) / 2
            loss.backward()
        if clip == "norm":
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        else:
            nn.utils.clip_grad_value_(model.parameters(), 0.1)
        optimizer.step()
    progress = autogate.gates(model).progress()
    assert progress.step == 40 and abs(progress.shares["FLOPs"] - 0.5) <= 0.01
    assert_exact(model, example)


def test_a_frozen_backbone_is_gated_and_otherwise_left_alone():
    model, example = net(flops=0.7, steps=40)
    bank = autogate.gates(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(("layer4", "fc")))
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.05)
    sides = [side for side in bank.channel_map.gated if not model.get_parameter(side.tensor).requires_grad]
    assert sides
    before = {side: (model.get_parameter(side.tensor).clone(), _along(bank.folded, bank, side)) for side in sides}
    for step in range(40):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()
    assert bank.progress().settled
    for side, (weight, gate) in before.items():
        wanted = weight / gate * _along(bank.folded, bank, side)
        torch.testing.assert_close(model.get_parameter(side.tensor).detach(), wanted, rtol=1e-4, atol=1e-7)
    assert_exact(model, example)


def _along(values: torch.Tensor, bank: autogate.GateBank, side) -> torch.Tensor:
    """A value per class, laid out along the side of a kernel that broadcasts to the kernel; 1 for pinned channels."""
    flat = torch.cat([values, torch.ones(1)])[bank.channel_map.classes[side]]
    return flat.view([-1 if dim == side.dim else 1 for dim in range(4)])


def test_training_on_after_the_steps_is_plain_fine_tuning():
    model, example = net(flops=0.5, steps=30)
    train(model, 30)
    bank = autogate.gates(model)
    live, alpha = bank.live.clone(), bank.alpha.clone()
    train(model, 10)
    assert torch.equal(bank.live, live) and torch.equal(bank.alpha, alpha)
    assert bank.progress().step == 30
    assert_exact(model, example)


def _free_port() -> int:
    with contextlib.closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


class Plain(nn.Module):
    """A residual net without batch statistics, so that a batch may be divided among processes."""

    def __init__(self):
        super().__init__()
        self.stem, self.conv1, self.conv2 = (nn.Conv2d(i, 16, 3, padding=1) for i in (3, 16, 16))
        self.unused, self.head = nn.Conv2d(16, 16, 1), nn.Linear(16, 4)

    def forward(self, x, also: bool = False):
        x = self.stem(x).relu()
        x = x + self.conv2(self.conv1(x).relu())
        if also:
            x = self.unused(x)
        return self.head(x.mean((2, 3)))


STEPS, GLOBAL_BATCH = 40, 8


def _train_share(rank: int, world: int, port: int, folder: str) -> None:
    """One process of a distributed run: its part of every global batch, the last of them of uneven sizes."""
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    if world > 1:
        torch.distributed.init_process_group("gloo", rank=rank, world_size=world)
    torch.manual_seed(0)
    model = autogate.prepare(Plain(), torch.randn(2, 3, 8, 8), flops=0.5, steps=STEPS)
    wrapped = _wrapped(model, world)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    _train_steps(wrapped, optimizer, range(STEPS), slice(rank, None, world), world)
    torch.save(model.state_dict(), f"{folder}/{world}_{rank}.pt")
    gated = output(model, torch.ones(2, 3, 8, 8))
    slim = autogate.finalize(wrapped, optimizer=optimizer)
    torch.testing.assert_close(output(slim, torch.ones(2, 3, 8, 8)), gated, rtol=1e-5, atol=1e-6)
    _train_steps(_wrapped(slim, world), optimizer, range(STEPS, STEPS + 10), slice(rank, None, world), world)
    torch.save(slim.state_dict(), f"{folder}/slim_{world}_{rank}.pt")
    if world == 2:
        _train_until_the_last_runs_out(rank, folder)
    if world > 1:
        torch.distributed.destroy_process_group()


def _wrapped(model: nn.Module, world: int) -> nn.Module:
    return nn.parallel.DistributedDataParallel(model, find_unused_parameters=True) if world > 1 else model


def _train_steps(wrapped: nn.Module, optimizer: torch.optim.Optimizer, steps: range, mine: slice, world: int) -> None:
    for step in steps:
        uneven = step % 10 == 9
        images = torch.randn(GLOBAL_BATCH + uneven, 3, 8, 8, generator=torch.Generator().manual_seed(step))
        labels = (images.mean((1, 2, 3)) > 0).long()
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(wrapped(images[mine]), labels[mine], reduction="sum")
        (loss * world / len(images)).backward()
        optimizer.step()


def _train_until_the_last_runs_out(rank: int, folder: str) -> None:
    """Two epochs in which the second process has more batches than the first, within `Join`."""
    torch.manual_seed(0)
    model = autogate.prepare(Plain(), torch.randn(2, 3, 8, 8), flops=0.5, steps=STEPS)
    wrapped = _wrapped(model, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for epoch in range(2):
        with Join([wrapped]):
            for step in range(STEPS // 2 - 3 * (1 - rank)):
                optimizer.zero_grad()
                loss = loss_of(wrapped, 1000 * epoch + 10 * step + rank, size=4)
                loss.backward()
                optimizer.step()
    assert autogate.gates(model).progress().step == STEPS and autogate.gates(model).progress().settled
    torch.save(model.state_dict(), f"{folder}/join_{rank}.pt")
    assert_exact(model, torch.ones(2, 3, 8, 8))


@pytest.mark.parametrize("world", [2, 4])
def test_every_process_of_a_distributed_run_has_the_same_gates(world, tmp_path):
    _train_share(0, 1, 0, str(tmp_path))
    torch.multiprocessing.spawn(_train_share, (world, _free_port(), str(tmp_path)), nprocs=world)
    alone = torch.load(tmp_path / "1_0.pt")
    states = [torch.load(tmp_path / f"{world}_{rank}.pt") for rank in range(world)]
    assert alone["autogate.dead"].any()
    joined = [torch.load(path) for path in sorted(tmp_path.glob("join_*.pt"))]
    assert len(joined) == (2 if world == 2 else 0)
    slim = [torch.load(tmp_path / f"slim_{world}_{rank}.pt") for rank in range(world)]
    for first, *others in filter(None, (states, joined, slim)):
        for state in others:
            for key, value in state.items():
                assert torch.equal(value, first[key]), f"{key} differs between processes"
    assert torch.equal(states[0]["autogate.dead"], alone["autogate.dead"])
    torch.testing.assert_close(states[0]["autogate.alpha"], alone["autogate.alpha"], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(slim[0], torch.load(tmp_path / "slim_1_0.pt"), rtol=1e-3, atol=1e-4)
