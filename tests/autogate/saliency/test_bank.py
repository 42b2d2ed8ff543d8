"""Training with saliency modules: phases, checkpoints, copies, and what other loops do."""

import copy
import io
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from autogate import adaptive
from autogate.saliency import SALIENCY, saliency_of
from tests.autogate.saliency.nets import IMAGES, Branches, chain, choose, lively
from tests.processes import free_port, run_in_processes

LABELS = torch.tensor([0, 1, 2])


def prepared(steps: int = 10, **options) -> nn.Module:
    torch.manual_seed(0)
    return adaptive.prepare(Branches(), IMAGES, flops=0.6, steps=steps, **options).train()


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(IMAGES), LABELS).backward()
        optimizer.step()


def own_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if "saliency" not in name}


def moved(model: nn.Module, before: dict[str, torch.Tensor]) -> bool:
    now = own_weights(model)
    return any(not torch.equal(now[name], before[name]) for name in before)


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.AdamW])
def test_only_the_modules_move_while_they_warm_up(make):
    model = prepared(steps=20, warmup=0.2)
    optimizer = make(model.parameters(), lr=0.01, weight_decay=0.1)
    before, bias = own_weights(model), model.stem[0].saliency.expand.bias.detach().clone()
    train(model, optimizer, 4)
    assert not moved(model, before)
    assert not torch.equal(model.stem[0].saliency.expand.bias, bias)
    train(model, optimizer, 1)
    assert moved(model, before)


def test_a_closure_is_frozen_too():
    model = prepared(steps=20, warmup=0.1)
    optimizer, before = torch.optim.SGD(model.parameters(), lr=0.1), own_weights(model)

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(model(IMAGES), LABELS)
        loss.backward()
        return loss

    for frozen in (True, True, False):
        optimizer.step(closure)
        assert moved(model, before) is not frozen


def test_an_optimizer_of_the_other_weights_is_frozen_too():
    model = prepared(steps=20, warmup=0.1)
    own = [p for name, p in model.named_parameters() if "saliency" not in name]
    others = [p for name, p in model.named_parameters() if "saliency" in name]
    optimizers, before = (torch.optim.SGD(own, lr=0.1), torch.optim.SGD(others, lr=0.1)), own_weights(model)
    for frozen in (True, True, False):
        model.zero_grad()
        F.cross_entropy(model(IMAGES), LABELS).backward()
        for optimizer in optimizers:
            optimizer.step()
        assert moved(model, before) is not frozen


def test_the_cost_of_steps_is_measured_and_the_penalty_follows():
    model = prepared(steps=10, warmup=0.2)
    bank = saliency_of(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    train(model, optimizer, 1)
    share = float(adaptive.cost(model).mean()) / bank.cost_of_images().dense
    assert float(bank.cost) == pytest.approx(share)
    assert float(bank.balance) == 0
    train(model, optimizer, 6)
    assert float(bank.balance) > 0
    pushes = {float(module.push) for module in bank.saliency_modules}
    assert len(pushes) == 1
    channels = sum(module.expand.out_features for module in bank.saliency_modules)
    assert pushes.pop() * channels == pytest.approx(float(bank.balance), rel=1e-5)


def test_published_lambda_is_that_of_the_measured_cost():
    model = prepared(steps=10, warmup=0.0, method=adaptive.SANP.published(lam=0.02))
    bank = saliency_of(model)
    train(model, torch.optim.SGD(model.parameters(), lr=0.01), 3)
    assert float(bank.balance) == pytest.approx(0.02 * (float(bank.cost) - 0.6), rel=1e-4)


def test_validation_between_steps_leaves_the_run_alone():
    models = [prepared(), prepared()]
    for validated, model in enumerate(models):
        torch.manual_seed(3)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        for _ in range(5):
            train(model, optimizer, 1)
            if validated:
                with torch.no_grad():
                    model.eval()(torch.zeros(5, 3, 16, 16))
                model.train()
    assert all(torch.equal(a, b) for a, b in zip(*(model.state_dict().values() for model in models), strict=True))


@pytest.mark.slow
def test_a_resumed_run_goes_on_as_it_would_have():
    model = prepared()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    train(model, optimizer, 5)
    saved = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict()], saved)
    saved.seek(0)
    other = prepared()
    states = torch.load(saved)
    other.load_state_dict(states[0])
    theirs = torch.optim.AdamW(other.parameters(), lr=0.01)
    theirs.load_state_dict(states[1])
    for one, its in ((model, optimizer), (other, theirs)):
        torch.manual_seed(7)
        train(one, its, 5)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True))


def test_states_of_other_models_are_refused():
    model = prepared()
    other = adaptive.prepare(Branches(), IMAGES, flops=0.6, ignore="join")
    with pytest.raises(RuntimeError, match="belong to another model"):
        other.load_state_dict(model.state_dict(), strict=False)
    with pytest.raises(RuntimeError, match="Load a dense state before"):
        model.load_state_dict(Branches().state_dict())


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_choose_and_train_by_themselves(copied):
    model = prepared(steps=10, warmup=0.2)
    choose(model)
    train(model, torch.optim.SGD(model.parameters(), lr=0.01), 3)
    other = copied(model)
    assert torch.equal(other.eval()(IMAGES), model.eval()(IMAGES))
    assert torch.equal(adaptive.cost(other), adaptive.cost(model))
    steps = int(saliency_of(model).step_count)
    train(other.train(), torch.optim.SGD(other.parameters(), lr=0.01), 2)
    assert (int(saliency_of(model).step_count), int(saliency_of(other).step_count)) == (steps, steps + 2)


def test_an_average_of_the_model_chooses_too():
    model = prepared()
    average = torch.optim.swa_utils.AveragedModel(model, use_buffers=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(3):
        train(model, optimizer, 1)
        average.update_parameters(model)
    average.eval()(IMAGES)
    assert adaptive.cost(average.module).shape == (3,)


def test_an_optimizer_without_the_modules_is_told():
    model = Branches()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    adaptive.prepare(model, IMAGES, flops=0.6, steps=10)
    with pytest.warns(UserWarning, match="built before"):
        train(model, optimizer, 2)
    model = prepared()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, torch.optim.SGD(model.parameters(), lr=0.01), 3)


def test_mixed_precision_and_half_models_choose_as_in_full():
    model = prepared().eval()
    choose(model)
    model(IMAGES)
    cost = adaptive.cost(model)
    with torch.autocast("cpu", torch.bfloat16):
        model(IMAGES)
    assert torch.allclose(adaptive.cost(model), cost, rtol=0.1)
    with torch.autocast("cpu", torch.bfloat16):
        train(model.train(), torch.optim.SGD(model.parameters(), lr=0.01), 3)
    half = model.to(torch.bfloat16).eval()
    half(IMAGES.bfloat16())
    assert saliency_of(half).step_count.dtype == torch.float64
    assert adaptive.cost(half).isfinite().all()


@pytest.mark.slow
def test_a_loss_scaler_changes_nothing():
    """The penalty's unit is the gradient that arrives, scaled or not."""
    ends = []
    for scale in (1.0, 1024.0):
        model = prepared(steps=10, warmup=0.1)
        torch.manual_seed(5)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        for _ in range(6):
            optimizer.zero_grad()
            (scale * F.cross_entropy(model(IMAGES), LABELS)).backward()
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter.grad /= scale
            optimizer.step()
        ends.append(model.state_dict())
    names = [name for name, p in prepared().named_parameters()]
    assert all(torch.allclose(ends[0][name], ends[1][name], atol=1e-5) for name in names)


def test_checkpointing_and_accumulation_count_a_forward_once():
    model = prepared()
    plain = chain()
    body = nn.Sequential(*list(plain)[:-1])

    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = body, plain[-1]

        def forward(self, x):
            return self.head(torch.utils.checkpoint.checkpoint(self.body, x, use_reentrant=False))

    model = adaptive.prepare(lively(Checkpointed()), IMAGES, flops=0.6, steps=10)
    F.cross_entropy(model(IMAGES), LABELS).backward()
    assert len(saliency_of(model).notes.calls) == 4
    grads = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    torch.utils.checkpoint.checkpoint, real = lambda f, x, use_reentrant: f(x), torch.utils.checkpoint.checkpoint
    try:
        F.cross_entropy(model(IMAGES), LABELS).backward()
    finally:
        torch.utils.checkpoint.checkpoint = real
    assert all(torch.allclose(a, p.grad) for a, p in zip(grads, model.parameters(), strict=True))


@pytest.mark.slow
def test_compiled_training_takes_the_same_steps():
    ends = []
    for compiled in (False, True):
        model = prepared(steps=6, warmup=0.2, method=adaptive.SANP(noise=0.0))
        for module in saliency_of(model).saliency_modules:
            module.soft.zero_()
        runs = torch.compile(model, backend="aot_eager") if compiled else model
        torch.manual_seed(0)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        for _ in range(5):
            for module in saliency_of(model).saliency_modules:
                module.soft.zero_()  # no draws: compiled code draws in another order
            train(runs, optimizer, 1)
        ends.append(model.state_dict())
        assert int(saliency_of(model).step_count) == 5
        assert float(saliency_of(model).cost) > 0.5
        assert adaptive.cost(runs).shape == (3,)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(ends[0].values(), ends[1].values(), strict=True))


def _one_process(rank: int, count: int, port: int, wanted: dict[str, torch.Tensor]) -> None:
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=count)
    model = _trained(lambda one: nn.parallel.DistributedDataParallel(one))
    for name, value in model.state_dict().items():
        assert torch.allclose(value, wanted[name], atol=1e-5), name
    torch.distributed.destroy_process_group()


def _trained(wrap) -> nn.Module:
    """Trained on the same images in all processes, without draws: they take the steps of one."""
    model = prepared(steps=10, warmup=0.2, method=adaptive.SANP(noise=0.0))
    wrapped = wrap(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(6):
        for module in saliency_of(model).saliency_modules:
            module.soft.zero_()
        train(wrapped, optimizer, 1)
    return model


@pytest.mark.slow
def test_two_processes_take_the_steps_of_one():
    run_in_processes(_one_process, 2, 2, free_port(), _trained(lambda one: one).state_dict())


def test_state_dict_has_the_modules_under_their_convolutions():
    names = set(prepared().state_dict())
    assert {"stem.0.saliency.reduce.weight", "stem.0.saliency.expand.bias", f"{SALIENCY}.step_count"} <= names
