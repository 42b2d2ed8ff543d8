"""A training loop by Accelerate."""

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from torch import nn

import autogate
from tests.autogate.loops.small_nets import EXAMPLE, Halves, Residual, batches

EPOCHS, BATCHES, ACCUMULATED = 3, 20, 2
STEPS = EPOCHS * BATCHES // ACCUMULATED


@pytest.fixture(autouse=True)
def fresh_state():
    """Accelerate keeps its settings for the life of the process."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


class Loop:
    """What the user writes, from Accelerate's own guide."""

    def __init__(self, kind: type[nn.Module] = Residual, mixed_precision: str = "no", prepare: bool = True):
        AcceleratorState._reset_state(reset_partial_state=True)
        self.accelerator = Accelerator(
            cpu=True, gradient_accumulation_steps=ACCUMULATED, mixed_precision=mixed_precision
        )  # fmt: skip
        torch.manual_seed(0)
        model = kind()
        if prepare:
            model = autogate.prepare(model, EXAMPLE, flops=0.5, steps=STEPS)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
        self.model, self.optimizer, self.schedule, self.loader = self.accelerator.prepare(
            model, optimizer, schedule, batches(BATCHES)
        )

    def train(self, epochs: int) -> None:
        for _ in range(epochs):
            for images, labels in self.loader:
                with self.accelerator.accumulate(self.model):
                    self.accelerator.backward(nn.functional.cross_entropy(self.model(images), labels))
                    if self.accelerator.sync_gradients:
                        self.accelerator.clip_grad_norm_(self.model.parameters(), 1.0)
                    self.optimizer.step()
                    self.schedule.step()
                    self.optimizer.zero_grad()


def plain_loop() -> nn.Module:
    torch.manual_seed(0)
    model = autogate.prepare(Residual(), EXAMPLE, flops=0.5, steps=STEPS)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    for _ in range(EPOCHS):
        for index, (images, labels) in enumerate(batches(BATCHES)):
            (nn.functional.cross_entropy(model(images), labels) / ACCUMULATED).backward()
            if index % ACCUMULATED == ACCUMULATED - 1:
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
    return model


def assert_same_state(model: nn.Module, wanted: nn.Module) -> None:
    state = model.state_dict()
    for name, value in wanted.state_dict().items():
        assert torch.equal(state[name], value), name


def test_an_accelerators_run_is_the_plain_loops_and_resumes_exactly(tmp_path):
    whole = Loop()
    whole.train(1)
    whole.accelerator.save_state(str(tmp_path))
    whole.train(EPOCHS - 1)
    progress = autogate.gates(whole.model).progress()
    assert progress.step == STEPS and progress.settled and progress.dead
    assert_same_state(whole.model, plain_loop())

    resumed = Loop()
    resumed.accelerator.load_state(str(tmp_path))
    resumed.train(EPOCHS - 1)
    assert_same_state(resumed.model, whole.model)


@pytest.mark.parametrize("unwrap", [False, True])
@pytest.mark.parametrize("kind", [Residual, Halves])
def test_a_model_that_runs_in_bf16_is_finalized_to_the_last_digit(kind, unwrap):
    """Accelerate puts autocast around the forward, on the instance: where a rewritten one has to go."""
    loop = Loop(kind, mixed_precision="bf16")
    loop.train(EPOCHS)
    wrapped = loop.model.forward
    with torch.no_grad():
        bank = autogate.gates(loop.model)
        bank.alpha[::3] = 0
        bank.fold()
    reference = kind()
    with torch.no_grad():
        reference.load_state_dict(
            {name: value for name, value in loop.model.state_dict().items() if not name.startswith("autogate")}
        )
        gated = reference.eval()(EXAMPLE)
        slim = autogate.finalize(loop.accelerator.unwrap_model(loop.model) if unwrap else loop.model, warn=False)
        assert wrapped != slim.forward and slim.head.in_features < 16
        torch.testing.assert_close(slim.eval()(EXAMPLE), gated, rtol=1e-5, atol=1e-6)
    again = loop.accelerator.prepare_model(slim)
    assert again(EXAMPLE).dtype == torch.float32


def test_a_failing_finalize_leaves_accelerates_forward_in_place():
    loop = Loop(mixed_precision="bf16")
    loop.model.stem.insert(3, nn.Conv2d(16, 16, 1))
    before = dict(loop.model.__dict__)
    with pytest.raises(autogate.AutogateError, match="changed since"):
        autogate.finalize(loop.model)
    assert loop.model.__dict__["forward"] is before["forward"]
    assert loop.model.__dict__["_original_forward"] is before["_original_forward"]


def test_a_model_within_accelerates_autocast_is_to_be_prepared_before():
    with pytest.raises(autogate.AutogateError, match="Prepare the model first"):
        autogate.prepare(Loop(mixed_precision="bf16", prepare=False).model, EXAMPLE)
