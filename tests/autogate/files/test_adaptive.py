"""Models that choose their channels for each image, in files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn

import autogate
from autogate import adaptive
from autogate.saliency import SALIENCY
from autogate.skipping import BreakEven, forwards_in
from benchmarks.adaptive_time import draw_codes
from tests.autogate.files.slim_nets import slimmed
from tests.autogate.files.test_untrusted_files import with_header
from tests.autogate.saliency.nets import IMAGES, Branches, choose, lively

EXAMPLE = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def prepared(model: nn.Module, x: torch.Tensor = IMAGES, **options: Any) -> nn.Module:
    model = adaptive.prepare(lively(model), x, flops=0.8, steps=20, **options)
    choose(model)
    return model


def stepped(model: nn.Module, x: torch.Tensor) -> nn.Module:
    torch.manual_seed(0)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)
    optimizer.zero_grad()
    model.train()(x).square().mean().backward()
    optimizer.step()
    return model.eval()


def same(one: nn.Module, other: nn.Module, x: torch.Tensor) -> bool:
    with torch.no_grad():
        outputs = torch.equal(one(x), other(x))
    state = one.state_dict()
    assert list(state) == list(other.state_dict())
    assert all(torch.equal(tensor, state[name]) for name, tensor in other.state_dict().items())
    return outputs and torch.equal(adaptive.cost(one), adaptive.cost(other))


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "test_convnext"])
def test_an_adaptive_model_comes_back_bit_for_bit(name: str, tmp_path: Path):
    torch.manual_seed(0)
    model = stepped(prepared(timm.create_model(name, num_classes=4), EXAMPLE, warmup=0.0), EXAMPLE)
    autogate.save(model, tmp_path / "adaptive.safetensors")
    loaded = autogate.load(tmp_path / "adaptive.safetensors")
    assert type(loaded) is type(model) and adaptive.bank(loaded).run == adaptive.bank(model).run
    for x in (EXAMPLE, torch.randn(1, 3, 48, 32)):
        assert same(model, loaded, x)
    assert same(stepped(model, EXAMPLE), stepped(loaded, EXAMPLE), EXAMPLE)  # the run goes on
    autogate.save(loaded, tmp_path / "again.safetensors")
    assert same(autogate.load(tmp_path / "again.safetensors"), model, EXAMPLE)


def test_a_slim_model_that_chooses_comes_back(tmp_path: Path):
    torch.manual_seed(0)
    model = prepared(slimmed(timm.create_model("test_resnet", num_classes=4), EXAMPLE), EXAMPLE)
    autogate.save(model.eval(), tmp_path / "adaptive.safetensors")
    assert same(autogate.load(tmp_path / "adaptive.safetensors"), model, EXAMPLE)


def test_a_model_of_your_own_in_half_precision_comes_back(tmp_path: Path):
    model = prepared(Branches()).bfloat16().eval()
    autogate.save(model, tmp_path / "adaptive.safetensors")
    assert same(autogate.load(tmp_path / "adaptive.safetensors", Branches()), model, IMAGES.bfloat16())


def drawn(name: str, images: torch.Tensor) -> nn.Module:
    """A model that uses some channels for some images, and others for none."""
    torch.manual_seed(0)
    model = adaptive.prepare(lively(timm.create_model(name, num_classes=4)), EXAMPLE, flops=0.8)
    draw_codes(model, images, 0.5)
    with torch.no_grad():
        for module in adaptive.bank(model).saliency_modules:
            module.expand.weight[::4] = 0
            module.expand.bias[::4] = -2.0
    return model


@pytest.mark.parametrize(
    ("name", "prototypes"), [("test_resnet", None), ("test_resnet", 2), ("test_efficientnet", None)]
)
def test_a_finalized_model_comes_back(name: str, prototypes: int | None, tmp_path: Path):
    images = torch.randn(12, 3, 32, 32)
    model = drawn(name, images)
    adaptive.finalize(model, batches=[images], prototypes=prototypes, break_even=1.0, warn=False)
    assert any(
        layer.prepared != len(layer.inputs) * len(layer.outputs) for layer in adaptive.bank(model).counting.layers
    )
    autogate.save(model.eval(), tmp_path / "adaptive.safetensors")
    loaded = autogate.load(tmp_path / "adaptive.safetensors")
    assert adaptive.grouping(loaded) == adaptive.grouping(model)
    with torch.inference_mode():
        for x in (images, images[:1], torch.randn(2, 3, 48, 32)):
            assert same(model, loaded, x)
    skips = {path: forward.break_even for path, forward in forwards_in(model).items()}
    assert {path: forward.break_even for path, forward in forwards_in(loaded).items()} == skips
    assert BreakEven(1.0, 1.0) in skips.values()
    told = autogate.summary(loaded)
    assert told.all_flops == autogate.summary(model).all_flops
    shares = [adaptive.budget(one, flops=0.5, batches=[images]) for one in (model, loaded)]
    assert shares[0] == shares[1] and same(model, loaded, EXAMPLE)
    autogate.save(loaded, tmp_path / "again.safetensors")


def test_stages_of_another_model_are_refused(tmp_path: Path):
    model = drawn("test_resnet", EXAMPLE)
    adaptive.finalize(model, batches=[EXAMPLE], prototypes=2, break_even=1.0, warn=False)
    autogate.save(model, tmp_path / "x")
    data = (tmp_path / "x").read_bytes()
    cases = {
        "module": lambda record: record["break_even"].update({"bn1": {"work": 1.0, "columns": 1.0}}),
        "number of prototypes": lambda record: record["stages"][0]["bias"].append(0.0),
        "out of bounds": lambda record: record["stages"][0]["codes"][0].update(on=[[999], [1]]),
        "nowhere": lambda record: record["stages"][0].update(path="nowhere"),
    }
    for part, change in cases.items():
        with_header(tmp_path / "y", data, lambda header, change=change: change(header["skipping"]))
        with pytest.raises(autogate.AutogateError, match=part):
            autogate.load(tmp_path / "y")


def test_codes_of_another_model_are_refused(tmp_path: Path):
    class Wider(Branches):
        def __init__(self) -> None:
            super().__init__()
            self.join = nn.Conv2d(36, 24, 3, padding=1, groups=2)

    autogate.save(prepared(Branches()), tmp_path / "adaptive.safetensors")
    other = Wider()
    before = [dict(vars(module)) for module in other.modules()]
    with pytest.raises(autogate.AutogateError, match=r"join.weight: it is of shape .* in this model"):
        autogate.load(tmp_path / "adaptive.safetensors", other)
    assert [dict(vars(module)) for module in other.modules()] == before


def test_a_forward_that_couples_channels_in_another_way_is_refused(tmp_path: Path):
    class Reversed(Branches):
        def forward(self, x):
            x = self.stem(x)
            x = self.down(x).flip(1) + self.project(self.depthwise(self.branch(x)))
            return self.head(self.join(torch.cat([x, self.left(x)], 1)).mean((2, 3)))

    autogate.save(prepared(Branches()), tmp_path / "adaptive.safetensors")
    other = Reversed()
    before = [{**vars(module), "_forward_hooks": dict(module._forward_hooks)} for module in other.modules()]
    with pytest.raises(autogate.AutogateError, match="the set of channels that choose differs"):
        autogate.load(tmp_path / "adaptive.safetensors", other)
    assert SALIENCY not in other._modules
    assert [{**vars(module), "_forward_hooks": dict(module._forward_hooks)} for module in other.modules()] == before


def test_a_layer_that_was_exchanged_is_told_of(tmp_path: Path):
    model = prepared(Branches())
    model.head = nn.Linear(24, 9)
    with pytest.raises(autogate.AutogateError, match=r"head.* when it was given saliency modules"):
        autogate.save(model, tmp_path / "x.safetensors")


CHANGES: dict[str, tuple[Any, str]] = {
    "share": (lambda record: record["run"].update(flops=2.0), r"flops is 2.0; it must be in \(0, 1\)"),
    "method": (lambda record: record["run"]["method"].update(noise=-1.0), "noise is -1.0"),
    "size": (lambda record: record["layers"][0].update(hidden=10**9), r"reduce.weight: its shape is \(1000000000, 3\)"),
    "layers": (lambda record: record["layers"].pop(), "the number of layers differs"),
    "path": (lambda record: record["layers"][0].update(path="x"), "the set of layers differs"),
    "kind": (lambda record: record["layers"][0].update(kind="whole"), r"what stem\.0 computes for each image differs"),
    "scaling": (lambda record: record["layers"][0]["scaling"].update(path="head"), r"what stem\.0 computes"),
    "channel": (lambda record: record["layers"][0]["zero_outputs"].append(99), "index 99 is out of bounds"),
    "type": (lambda record: record.update(layers=3), r"adaptive\.layers"),
}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("files") / "adaptive.safetensors"
    autogate.save(prepared(Branches()), path)
    return path.read_bytes()


@pytest.mark.parametrize("case", CHANGES)
def test_a_header_that_says_what_cannot_be(case: str, written: bytes, tmp_path: Path):
    change, part = CHANGES[case]
    with_header(tmp_path / "x", written, lambda header: change(header["adaptive"]))
    dense = Branches()
    attributes = [dict(vars(module)) for module in dense.modules()]
    with pytest.raises(autogate.AutogateError, match=part):
        autogate.load(tmp_path / "x", dense)
    assert [dict(vars(module)) for module in dense.modules()] == attributes
