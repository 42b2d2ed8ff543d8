"""On a GPU gates learn as on the CPU, and a step can be captured in a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import autogate
from tests.autogate.loops.small_nets import EXAMPLE, Residual, batches

STEPS = 40

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def images_and_labels() -> list[tuple[Tensor, Tensor]]:
    return [(images.cuda(), labels.cuda()) for images, labels in batches(STEPS)]


def prepared(hooks: bool = True) -> nn.Module:
    torch.manual_seed(0)
    return autogate.prepare(Residual().cuda(), EXAMPLE.cuda(), flops=0.5, steps=STEPS, hooks=hooks)


Step = Callable[[Tensor, Tensor], None]
"""Takes images and labels."""


def captured(step: Step, images: Tensor, labels: Tensor) -> Step:
    """A step as a CUDA graph, after it has been taken three times in a stream of its own, as PyTorch asks for."""
    images, labels = images.clone(), labels.clone()
    ahead = torch.cuda.Stream()
    ahead.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(ahead):
        for _ in range(3):
            step(images, labels)
    torch.cuda.current_stream().wait_stream(ahead)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(images, labels)

    def replay(new_images: Tensor, new_labels: Tensor) -> None:
        images.copy_(new_images)
        labels.copy_(new_labels)
        graph.replay()

    return replay


def slim_and_gates(model: nn.Module, take: Step) -> tuple[nn.Module, Tensor]:
    """The slim model after a run, and the classes that live in it."""
    for images, labels in images_and_labels():
        take(images, labels)
    bank = autogate.gates(model)
    assert bank.progress().settled and 0.4 < bank.shares()["FLOPs"] <= 0.51
    return autogate.finalize(model), bank.live


def test_a_captured_forward_and_backward_train_the_gates_alike():
    def run(graphed: bool) -> tuple[nn.Module, Tensor]:
        model = prepared()
        model.eval()  # the three steps ahead of a capture would move the norms' statistics
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)

        def gradients(images: Tensor, labels: Tensor) -> None:
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels).backward()

        if graphed:
            gradients = captured(gradients, *images_and_labels()[0])

        def take(images: Tensor, labels: Tensor) -> None:
            gradients(images, labels)
            optimizer.step()

        return slim_and_gates(model, take)

    (eager, alive), (replayed, alive_too) = run(False), run(True)
    assert torch.equal(alive, alive_too)
    torch.testing.assert_close(dict(replayed.named_parameters()), dict(eager.named_parameters()), rtol=1e-3, atol=1e-5)


def test_a_captured_optimizer_step_trains_the_gates_alike_without_hooks():
    def run(graphed: bool) -> tuple[nn.Module, Tensor]:
        model = prepared(hooks=False)
        model.eval()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)

        def step(images: Tensor, labels: Tensor) -> None:
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()

        if graphed:
            state = {name: value.clone() for name, value in model.state_dict().items()}
            step = captured(step, *images_and_labels()[0])
            model.load_state_dict(state)
            autogate.gates(model).fold()

        def take(images: Tensor, labels: Tensor) -> None:
            step(images, labels)
            autogate.step(model, lr=0.05)

        return slim_and_gates(model, take)

    (eager, alive), (replayed, alive_too) = run(False), run(True)
    assert torch.equal(alive, alive_too)
    torch.testing.assert_close(dict(replayed.named_parameters()), dict(eager.named_parameters()), rtol=1e-3, atol=1e-5)


def test_a_captured_optimizer_step_with_hooks_is_refused():
    model = prepared()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    images, labels = images_and_labels()[0]
    F.cross_entropy(model(images), labels).backward()
    optimizer.step()
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(autogate.AutogateError, match="hooks=False"), torch.cuda.graph(graph):
        optimizer.step()


def test_what_a_gpu_trains_is_what_the_processor_trains():
    def run(device: str) -> Tensor:
        torch.manual_seed(0)
        model = autogate.prepare(Residual().double(), EXAMPLE.double(), flops=0.5, steps=STEPS).to(device)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        for images, labels in batches(STEPS):
            optimizer.zero_grad()
            F.cross_entropy(model(images.double().to(device)), labels.to(device)).backward()
            optimizer.step()
        return autogate.gates(model).live.cpu()

    assert torch.equal(run("cuda"), run("cpu"))


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_for_a_gpu(mode):
    model = prepared()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    compiled = torch.compile(model, mode=mode)

    def take(images: Tensor, labels: Tensor) -> None:
        optimizer.zero_grad()
        F.cross_entropy(compiled(images), labels).backward()
        optimizer.step()

    slim, _ = slim_and_gates(model, take)
    assert all(weight.isfinite().all() for weight in slim.parameters())
