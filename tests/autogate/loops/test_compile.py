"""torch.compile: each mode is compiled once and has no graph break, from prepare to finalize."""

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

import autogate
from tests.autogate.loops.small_nets import EXAMPLE, Residual
from tests.slow import slow_but

STEPS = 30


class Outer(nn.Module):
    """A model that holds the gated one, whose hook Dynamo then traces."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return 2 * self.inner(x)


def prepared(**options) -> nn.Module:
    torch.manual_seed(0)
    return autogate.prepare(Residual(), EXAMPLE, flops=0.5, steps=STEPS, **options)


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    images = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(step))
    return images, (images.mean((1, 2, 3)) > 0).long()


def train(compiled: nn.Module, after=lambda: None) -> None:
    """To the target and beyond, with an evaluation now and then."""
    optimizer = torch.optim.SGD(compiled.parameters(), lr=0.05, momentum=0.9)
    for step in range(STEPS + 5):
        images, labels = batch(step)
        compiled.train()
        optimizer.zero_grad()
        nn.functional.cross_entropy(compiled(images), labels).backward()
        optimizer.step()
        after()
        if step % 5 == 4:
            compiled.eval()
            with torch.no_grad():
                compiled(images)


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    counters.clear()
    with torch._dynamo.config.patch(error_on_recompile=False):
        yield
    torch._dynamo.reset()


@pytest.mark.parametrize("backend", slow_but(["eager"], ["eager", "aot_eager"]))
@pytest.mark.parametrize("hooks", [True, False])
def test_a_whole_run_compiles_once_a_mode(backend, hooks):
    model = prepared(hooks=hooks)
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(model, backend=counter, fullgraph=True)

    def after() -> None:
        if not hooks:
            autogate.step(compiled, lr=0.05)
        # From the first evaluation on nothing may be compiled again, a hook's frame neither.
        torch._dynamo.config.error_on_recompile = counter.frame_count == 2

    train(compiled, after)
    progress = autogate.gates(compiled).progress()
    assert progress.step == STEPS and progress.settled and progress.dead
    images, _ = batch(0)
    compiled.eval()
    with torch.no_grad():
        gated = compiled(images)
    assert counter.frame_count == 2  # once to train, once to evaluate
    assert not counters["graph_break"] and torch._dynamo.config.error_on_recompile
    torch._dynamo.config.error_on_recompile = False  # the slim model has other shapes
    with torch.no_grad():
        torch.testing.assert_close(autogate.finalize(compiled)(images), gated, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(compiled(images), gated, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("way", slow_but(["in place"], ["around", "in place"]))
def test_other_ways_to_compile_take_the_same_course(way):
    plain = prepared()
    train(Outer(plain))
    model = prepared()
    counter = CompileCounterWithBackend("eager")
    outer = Outer(model)
    if way == "around":
        outer = torch.compile(outer, backend=counter, fullgraph=True)
    else:
        outer.compile(backend=counter, fullgraph=True)
    train(outer)
    assert counter.frame_count == 2 and not counters["graph_break"]
    state = model.state_dict()
    for name, value in plain.state_dict().items():
        assert torch.equal(state[name], value), name


@pytest.mark.parametrize("hooks", [True, False])
def test_no_tensor_of_the_model_ever_moves(hooks):
    """What CUDA graphs need: a replay reads and writes the addresses that it was captured with."""
    model = prepared(hooks=hooks)

    def addresses():
        return {name: tensor.data_ptr() for name, tensor in (*model.named_parameters(), *model.named_buffers())}

    before = addresses()
    train(model, (lambda: None) if hooks else (lambda: autogate.step(model, lr=0.05)))
    assert autogate.gates(model).progress().settled
    with torch.no_grad():
        autogate.gates(model).alpha[:2] = 0
        model(batch(0)[0])
    assert addresses() == before
    assert {f"autogate.{name}" for name in ("alpha", "folded", "dead", "epsilon")} <= before.keys()


@pytest.mark.slow
def test_a_compiled_optimizer_leaves_the_gates_step_out():
    def trained(compiled: bool, counter: CompileCounterWithBackend) -> autogate.GateBank:
        model = prepared()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        step = torch.compile(optimizer.step, backend=counter) if compiled else optimizer.step
        for number in range(12):
            images, labels = batch(number)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images), labels).backward()
            step()
        return autogate.gates(model)

    counter = CompileCounterWithBackend("eager")
    plain, bank = trained(False, counter), trained(True, counter)
    assert bank.progress().step == 12 and torch.equal(bank.live, plain.live)
    torch.testing.assert_close(bank.alpha, plain.alpha)
    assert counter.frame_count <= 3  # with the gates' step traced it were dozens
