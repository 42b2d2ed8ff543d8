"""Training resumes in the slim model, and ends where gates would have led it."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from timm.optim import Adafactor, create_optimizer_v2
from torch import nn

import autogate
from tests.autogate.loops.small_nets import EXAMPLE, Halves, Residual, batches

STEPS, SETTLED = 40, 25

OPTIMIZERS = {
    "sgd": partial(torch.optim.SGD, lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-3),
    "adam": partial(torch.optim.Adam, lr=1e-2, amsgrad=True),
    "adamw, foreach": partial(torch.optim.AdamW, lr=1e-2, foreach=True),
    "rmsprop": partial(torch.optim.RMSprop, lr=1e-3, momentum=0.9, centered=True),
    "nadam": partial(torch.optim.NAdam, lr=1e-3),
    "rprop": partial(torch.optim.Rprop, lr=1e-3),
    "adagrad": partial(torch.optim.Adagrad, lr=1e-2),
    "lookahead": lambda parameters: create_optimizer_v2(parameters, "lookahead_adamw", lr=1e-2),
    "lion": lambda parameters: create_optimizer_v2(parameters, "lion", lr=1e-4),
}


def prepared(kind: type[nn.Module] = Residual, **options) -> nn.Module:
    """A prepared model. Its biases before batch norms are frozen.

    They have a gradient of rounding alone, which an optimizer that divides by the gradient's size makes large.
    """
    torch.manual_seed(0)
    model = kind().double()
    for layer in (model.stem[0], model.block[0]):
        layer.bias.requires_grad_(False)
    return autogate.prepare(model, EXAMPLE.double(), flops=0.5, steps=STEPS, **options)


def train(model, optimizer, steps: int, begin: int = 0) -> None:
    model.train()
    for images, labels in list(batches(STEPS))[begin : begin + steps]:
        optimizer.zero_grad()
        F.cross_entropy(model(images.double()), labels).backward()
        optimizer.step()


def of_both_ways(make, **options):
    """The slim model that was trained on as such, and the one that was slimmed at the end; their optimizers."""
    (early, first), (late, second) = (
        (model, make(model.parameters())) for model in (prepared(**options), prepared(**options))
    )
    train(early, first, SETTLED)
    assert autogate.gates(early).progress().settled
    autogate.finalize(early, optimizer=first)
    train(early, first, STEPS - SETTLED, SETTLED)
    train(late, second, STEPS)
    return early, first, autogate.finalize(late, optimizer=second), second


def check_alike(one: nn.Module, other: nn.Module) -> None:
    assert one.state_dict().keys() == other.state_dict().keys()
    for name, tensor in one.state_dict().items():
        torch.testing.assert_close(tensor, other.state_dict()[name], rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_goes_on_as_with_gates(name):
    early, optimizer, late, late_optimizer = of_both_ways(OPTIMIZERS[name])
    assert sum(parameter.numel() for parameter in early.parameters()) < 0.6 * sum(
        parameter.numel() for parameter in Residual().parameters()
    )
    check_alike(early, late)
    states = [list(one.state_dict()["state"].values()) for one in (optimizer, late_optimizer)]
    for mine, other in zip(*states, strict=True):
        assert mine.keys() == other.keys()
        for key, value in mine.items():
            torch.testing.assert_close(value, other[key], rtol=1e-8, atol=1e-12, msg=key)


@pytest.mark.parametrize(("kind", "shortcuts"), [(Halves, "shared"), (Residual, "conv")], ids=["sizes", "shortcuts"])
def test_a_rewritten_forward_trains_on(kind, shortcuts):
    early, _, late, _ = of_both_ways(OPTIMIZERS["sgd"], kind=kind, shortcuts=shortcuts)
    check_alike(early, late)


def test_groups_keep_their_settings_and_names():
    model = prepared()
    train(model, OPTIMIZERS["sgd"](model.parameters()), SETTLED)
    own = dict(model.named_parameters())
    decayed = [(name, parameter) for name, parameter in own.items() if parameter.ndim > 1]
    plain = [(name, parameter) for name, parameter in own.items() if parameter.ndim == 1]
    other = nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.SGD(
        [{"params": decayed, "weight_decay": 0.1}, {"params": [*plain, ("other", other)], "lr": 0.5}], lr=0.1
    )
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    slim = autogate.finalize(model, optimizer=optimizer)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0]
    train(slim, optimizer, 1)
    schedule.step()
    assert schedule.get_last_lr() == [0.05, 0.25]
    for group, names in zip(optimizer.param_groups, (decayed, plain), strict=True):
        held = dict(zip(group["param_names"], group["params"], strict=True))
        assert {name: held.get(name) for name, _ in names} == {name: slim.get_parameter(name) for name, _ in names}
    assert optimizer.param_groups[1]["params"][-1] is other


def test_what_is_taken_out_leaves_the_optimizer():
    """A convolution on a shortcut that is the identity still becomes a shortcut again."""
    model = prepared(shortcuts="conv")
    optimizer = OPTIMIZERS["sgd"](dict(model.named_parameters()).items())
    with torch.no_grad():
        autogate.gates(model).alpha[::3] = 0
    model(EXAMPLE.double()).sum().backward()
    before = len(optimizer.param_groups[0]["params"])
    optimizer.state.update({p: {"momentum_buffer": torch.zeros_like(p)} for p in model.parameters()})
    slim = autogate.finalize(model, optimizer=optimizer, warn=False)
    group = optimizer.param_groups[0]
    assert set(map(id, optimizer.state)) == set(map(id, slim.parameters()))
    assert dict(zip(group["param_names"], group["params"], strict=True)) == dict(slim.named_parameters())
    assert len(group["params"]) < before


def test_a_kernel_in_two_places_stays_one():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.first = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3, padding=1)
            self.second, self.head = nn.Conv2d(16, 16, 3, padding=1), nn.Linear(16, 4)
            self.second.weight = self.first.weight

        def forward(self, x):
            return self.head(self.second(self.first(self.stem(x)).relu()).mean((2, 3)))

    model = autogate.prepare(Tied(), EXAMPLE, flops=1.0)
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    F.cross_entropy(model(EXAMPLE), torch.tensor([0, 1])).backward()
    optimizer.step()
    kernel = model.first.weight
    momentum = optimizer.state[kernel]["momentum_buffer"]
    with torch.no_grad():
        autogate.gates(model).alpha[:6] = 0
    slim = autogate.finalize(model, optimizer=optimizer, warn=False)
    assert slim.first.weight is slim.second.weight and kernel not in optimizer.state
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == [id(p) for p in slim.parameters()]
    cut = optimizer.state[slim.first.weight]["momentum_buffer"]
    assert cut.shape == slim.first.weight.shape and torch.equal(cut, momentum[6:, 6:])


def test_factored_moments_are_cut_and_those_of_other_shapes_begin_anew():
    model = prepared()
    factored = torch.optim.Adafactor(model.parameters())
    train(model, factored, SETTLED)
    slim = autogate.finalize(model, optimizer=factored, warn=False)
    kernel = slim.get_submodule("block.0").weight
    state = factored.state[kernel]
    assert state["row_var"].shape[:-1] == kernel.shape[:-1] and state["col_var"].shape[-2:] == (1, kernel.shape[-1])
    train(slim, factored, 1)

    model = prepared()
    factored = Adafactor(model.parameters(), lr=1e-3, min_dim_size_to_factor=4)
    train(model, factored, SETTLED)
    slim = autogate.finalize(model, optimizer=factored, warn=False)
    assert slim.get_submodule("block.0").weight not in factored.state
    train(slim, factored, 1)


def test_a_vector_that_fits_a_kernel_by_chance_begins_anew():
    model = prepared()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    with torch.no_grad():
        autogate.gates(model).alpha[::2] = 0
    optimizer.state[model.head.weight] = {"of whatever": torch.ones(len(model.head.weight))}
    slim = autogate.finalize(model, optimizer=optimizer, warn=False)
    assert slim.head.in_features < 16 and slim.head.weight not in optimizer.state


def test_several_optimizers_and_a_wrapped_one():
    class Wrapper:
        def __init__(self, optimizer):
            self.optimizer = optimizer

    model = prepared()
    stem = torch.optim.SGD(model.stem.parameters(), 0.1)
    rest = torch.optim.Adam([*model.block.parameters(), *model.head.parameters()])
    with torch.no_grad():
        autogate.gates(model).alpha[::2] = 0
    slim = autogate.finalize(model, optimizer=[stem, Wrapper(rest)], warn=False)
    held = [parameter for one in (stem, rest) for parameter in one.param_groups[0]["params"]]
    assert [id(parameter) for parameter in held] == [id(parameter) for parameter in slim.parameters()]


def test_what_trains_nothing_of_the_model_is_refused():
    model = prepared()
    for wrong, message in (
        (torch.optim.SGD(Residual().parameters(), 0.1), "no parameter"),
        (model.head, "not a torch"),
    ):
        with pytest.raises(autogate.AutogateError, match=message):
            autogate.finalize(model, optimizer=wrong, warn=False)
    assert autogate.gates(model).follows


def test_memory_formats_stay():
    model = prepared().to(memory_format=torch.channels_last)
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    train(model, optimizer, SETTLED)
    slim = autogate.finalize(model, optimizer=optimizer)
    kernel = slim.get_submodule("block.0").weight
    for tensor in (kernel, optimizer.state[kernel]["momentum_buffer"]):
        assert tensor.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.slow
def test_a_compiled_model_trains_on():
    torch._dynamo.reset()
    model = prepared()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    train(compiled, optimizer, SETTLED)
    plain = copy.deepcopy((model, optimizer))
    slim = autogate.finalize(compiled, optimizer=optimizer)
    train(compiled, optimizer, STEPS - SETTLED, SETTLED)
    train(*plain, STEPS - SETTLED, SETTLED)
    check_alike(slim, autogate.finalize(plain[0]))
    torch._dynamo.reset()


@pytest.fixture
def accelerator():
    """Makes one; Accelerate keeps its settings for the life of the process."""
    yield partial(Accelerator, cpu=True)
    AcceleratorState._reset_state(reset_partial_state=True)


def test_accelerate_trains_on(accelerator):
    model = prepared()
    plain = copy.deepcopy(model)
    model, optimizer = accelerator().prepare(model, OPTIMIZERS["sgd"](model.parameters()))
    own = OPTIMIZERS["sgd"](plain.parameters())
    train(model, optimizer, SETTLED)
    slim = autogate.finalize(model, optimizer=optimizer)
    train(slim, optimizer, STEPS - SETTLED, SETTLED)
    train(plain, own, STEPS)
    check_alike(slim, autogate.finalize(plain))


def test_accelerates_mixed_precision_is_put_around_the_slim_model_anew(accelerator):
    mixed = accelerator(mixed_precision="bf16")
    model = prepared().float()
    model, optimizer = mixed.prepare(model, OPTIMIZERS["sgd"](model.parameters()))
    slim = autogate.finalize(model, EXAMPLE, optimizer=optimizer, warn=False)
    seen = []
    slim.stem[0].register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    slim(EXAMPLE)
    mixed.prepare_model(slim)(EXAMPLE)
    assert seen == [torch.float32, torch.bfloat16]
