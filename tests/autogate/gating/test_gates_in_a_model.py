"""A prepared model is copied, compiled, trained and checkpointed like any other."""

import copy
import io
import os
import pickle
import random
import signal
import time
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

import autogate


def prepared(**options) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    example = torch.randn(2, 3, 32, 32)
    model = timm.create_model("test_resnet", num_classes=4)
    return autogate.prepare(model, example, **options), example


def train(model: nn.Module, steps: int, optimizer: torch.optim.Optimizer, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        images = torch.randn(8, 3, 32, 32, generator=generator)
        labels = (images.mean((1, 2, 3)) > 0).long()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
        optimizer.zero_grad()


@torch.no_grad()
def output(model: nn.Module, example: torch.Tensor) -> torch.Tensor:
    return model.eval()(example)


def test_the_budget_is_met_in_a_plain_loop_and_finalize_says_nothing(recwarn):
    model, example = prepared(flops=0.5, steps=60)
    train(model, 60, torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9))
    gated = output(model, example)
    left = autogate.summary(model)
    assert abs(left.flops / left.all_flops - 0.5) <= 0.01
    slim = autogate.finalize(model)
    assert not [w for w in recwarn if w.category is autogate.BudgetNotMetWarning]
    torch.testing.assert_close(output(slim, example), gated, rtol=1e-5, atol=1e-5)


def test_an_optimizer_built_before_prepare_moves_the_gates():
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    autogate.prepare(model, torch.randn(2, 3, 32, 32), steps=20)
    train(model, 3, optimizer)
    assert autogate.gates(model).progress().step == 3


def test_a_deep_copy_and_a_pickle_finalize_like_the_original():
    model, example = prepared(steps=40)
    train(model, 30, torch.optim.SGD(model.parameters(), lr=0.05))
    gated = output(model, example)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        slim = autogate.finalize(twin, warn=False)
        torch.testing.assert_close(output(slim, example), gated, rtol=1e-5, atol=1e-5)
        assert sum(p.numel() for p in slim.parameters()) < sum(p.numel() for p in model.parameters())


def test_resuming_from_a_checkpoint_takes_the_same_course():
    model, _ = prepared(steps=40)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    train(model, 15, optimizer, seed=1)
    file = io.BytesIO()
    torch.save((model.state_dict(), optimizer.state_dict()), file)
    train(model, 15, optimizer, seed=2)

    resumed, _ = prepared(steps=40)
    file.seek(0)
    weights, state = torch.load(file)
    resumed.load_state_dict(weights)
    again = torch.optim.SGD(resumed.parameters(), lr=0.05, momentum=0.9)
    again.load_state_dict(state)
    train(resumed, 15, again, seed=2)
    for (name, value), wanted in zip(resumed.state_dict().items(), model.state_dict().values(), strict=True):
        assert torch.equal(value, wanted), name


def test_gates_stand_before_regular_convolutions_only():
    torch.manual_seed(0)
    model = autogate.prepare(timm.create_model("mobilenetv2_100"), torch.randn(2, 3, 64, 64))
    depthwise = {name for name, m in model.named_modules() if isinstance(m, nn.Conv2d) and m.groups > 1}
    gated = {side.tensor.removesuffix(".weight") for side in autogate.gates(model).channel_map.gated}
    layers = {name for name, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}
    assert gated == layers - depthwise - {"conv_stem"}


def test_train_mode_is_left_as_it_was():
    model, _ = prepared()
    model.train()
    model.layer1.eval()
    before = {path: module.training for path, module in model.named_modules() if path != "autogate"}
    autogate.finalize(model, warn=False)
    assert {path: module.training for path, module in model.named_modules()} == before


@pytest.mark.parametrize("given", ["tuple", "dict"])
def test_example_inputs_as_a_tuple_or_a_dict(given):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 8, 3), nn.Conv2d(3, 8, 3), nn.Conv2d(8, 2, 1)

        def forward(self, left, right):
            return {"sum": self.c(self.a(left) + self.b(right))}

    left, right = torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8, 8)
    model = autogate.prepare(Two(), (left, right) if given == "tuple" else {"left": left, "right": right})
    assert autogate.gates(model).channel_map.size == 8
    with torch.no_grad():
        autogate.gates(model).alpha[:5] = 0
    wanted = output_of(model, left, right)
    torch.testing.assert_close(output_of(autogate.finalize(model, warn=False), left, right), wanted)


@torch.no_grad()
def output_of(model, left, right):
    return model(left, right)["sum"]


def test_compiled_forward_neither_breaks_nor_recompiles():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(128, 2))
    model = autogate.prepare(net, torch.randn(2, 3, 8, 8), steps=20)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(20):
        compiled(torch.randn(4, 3, 8, 8)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert autogate.gates(model).progress().dead > 0
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gates_that_were_cast_are_refused(dtype: torch.dtype):
    model = autogate.prepare(nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 2, 1)), torch.randn(2, 3, 8, 8))
    cast = {name: value.to(dtype) if value.is_floating_point() else value for name, value in model.state_dict().items()}
    with pytest.raises(RuntimeError, match=f"autogate: the checkpoint's gates were cast to {dtype}"):
        model.load_state_dict(cast)


def test_gates_of_another_layout_are_not_loaded():
    model, example = prepared(steps=40)
    torch.manual_seed(0)
    other = timm.create_model("test_resnet", num_classes=4)
    other = autogate.prepare(other, example, steps=40, ignore=["layer1"])
    before = autogate.gates(model).alpha.clone()
    with pytest.raises(RuntimeError, match="autogate: these gates belong to another model, or to this one prepared"):
        model.load_state_dict(other.state_dict())
    assert torch.equal(autogate.gates(model).alpha, before)
    model.load_state_dict(prepared(steps=20)[0].state_dict())  # another budget is no other layout


def _train_with_checkpoints(folder: str, steps: int) -> None:
    """Train to `steps` from the latest checkpoint in the folder, each written whole or not at all."""
    torch.set_num_threads(1)
    model, _ = prepared(flops=0.5, steps=40)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    path, first = Path(folder) / "latest.pt", 0
    if path.exists():
        state = torch.load(path)
        first = state["step"]
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    for step in range(first, steps):
        train(model, 1, optimizer, seed=step)
        state = {"step": step + 1, "model": model.state_dict(), "optimizer": optimizer.state_dict()}
        torch.save(state, path.with_suffix(".new"))
        os.replace(path.with_suffix(".new"), path)


@pytest.mark.slow
def test_a_run_killed_at_random_steps_goes_on_where_it_was(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir(), killed.mkdir()
    _train_with_checkpoints(str(whole), 40)
    latest = killed / "latest.pt"
    processes = torch.multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload([__name__])  # to import takes seconds
    for least in sorted(random.Random(3).sample(range(1, 35), 2)):
        process = processes.Process(target=_train_with_checkpoints, args=(str(killed), 40))
        process.start()
        while not latest.exists() or torch.load(latest)["step"] < least:
            assert process.is_alive()
            time.sleep(0.005)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL and torch.load(latest)["step"] < 40
    _train_with_checkpoints(str(killed), 40)
    first, second = (torch.load(folder / "latest.pt")["model"] for folder in (whole, killed))
    assert first["autogate.dead"].any()
    for key, value in first.items():
        assert torch.equal(value, second[key]), key


def test_alphas_set_by_hand_count_before_they_are_folded():
    model = autogate.prepare(timm.create_model("test_resnet", num_classes=10), torch.randn(2, 3, 32, 32), flops=0.5)
    bank = autogate.gates(model)
    with torch.no_grad():
        bank.alpha[::2] = 0
    before = bank.shares(), bank.progress(), repr(bank), autogate.summary(model).flops
    assert before[0]["FLOPs"] < 1 and before[1].dead == len(bank.alpha[::2])
    bank.fold()
    assert before == (bank.shares(), bank.progress(), repr(bank), autogate.summary(model).flops)
