"""Slim models are saved and loaded without a change."""

import copy
import hashlib
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import autogate
from autogate import AutogateError
from autogate.slim.history import history_of
from benchmarks.parts import kill
from tests.autogate.files.slim_nets import PIXELS, build, example, outputs, slim_small, slimmed, small
from tests.rewriters.helpers import Net, conv, image
from tests.slow import slow_but


class Halves(nn.Module):
    """Splits its channels and adds onto one half: a forward that holds a size, a shortcut."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.inner, self.fc = conv(3, 32, 3), conv(16, 16, 3), nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        one, two = self.stem(x).relu().chunk(2, 1)
        one = one + self.inner(one).relu()
        return self.fc(torch.cat([one, two], 1).mean((2, 3)))


def assert_same(got: nn.Module, wanted: nn.Module, *args: Any, **kwargs: Any) -> None:
    """The same model to the last bit, as far as anyone can see."""
    assert [(path, type(m), m.training) for path, m in got.named_modules()] == [
        (path, type(m), m.training) for path, m in wanted.named_modules()
    ]
    here, there = got.state_dict(), wanted.state_dict()
    assert list(here) == list(there)
    assert all(torch.equal(here[name], there[name]) and here[name].dtype == there[name].dtype for name in there)
    assert [p.requires_grad for p in got.parameters()] == [p.requires_grad for p in wanted.parameters()]
    a, b = outputs(copy.deepcopy(got), *args, **kwargs), outputs(copy.deepcopy(wanted), *args, **kwargs)
    assert all(torch.equal(x, y) and x.dtype == y.dtype for x, y in zip(a, b, strict=True))


TIMM = {
    "plain": ("resnet18", {"num_classes": 10}, {}),
    "convolutions on shortcuts": ("resnet18", {}, {"shortcuts": "conv"}),
    "some of them": ("resnet18", {}, {"shortcuts": ["layer1", "layer3.1"]}),
    "ignored": ("resnet18", {}, {"ignore": ["layer1"]}),
    "other arguments": ("resnet18", {"in_chans": 4, "drop_path_rate": 0.1, "drop_rate": 0.2}, {}),
    "features": ("resnet18", {"features_only": True, "out_indices": (1, 3)}, {}),
    "rewritten forwards": ("cspresnet50", {"num_classes": 0}, {}),
    "convolutions along channels": ("eca_resnext26ts", {}, {}),
    "a tag": ("resnet18.fb_ssl_yfcc100m_ft_in1k", {"features_only": True}, {}),
    "image size": ("vit_tiny_patch16_224", {"img_size": PIXELS, "depth": 2}, {}),
}


TIMM_QUICK = ("plain", "convolutions on shortcuts", "image size")


@pytest.mark.parametrize("case", slow_but(TIMM_QUICK, TIMM))
def test_a_timm_model_needs_nothing_but_its_file(case: str, tmp_path: Path):
    name, options, asked = TIMM[case]
    inputs = example(channels=options.get("in_chans", 3))
    slim = slimmed(build(name, **options), inputs, **asked)
    known = {"depth": options["depth"]} if "depth" in options else None
    autogate.save(slim, tmp_path / "slim.safetensors", model_args=known)
    loaded = autogate.load(tmp_path / "slim.safetensors")
    assert_same(loaded, slim, inputs)
    assert loaded.pretrained_cfg == slim.pretrained_cfg


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtypes_are_kept(dtype: torch.dtype, tmp_path: Path):
    slim = slimmed(build(num_classes=10).to(dtype), example(dtype))
    autogate.save(slim, tmp_path / "slim.safetensors")
    assert_same(autogate.load(tmp_path / "slim.safetensors"), slim, example(dtype))


def test_a_model_turned_to_another_dtype_after_it_was_slimmed(tmp_path: Path):
    slim = slim_small().bfloat16()
    autogate.save(slim, tmp_path / "slim.safetensors")
    assert_same(autogate.load(tmp_path / "slim.safetensors", small()), slim, image().bfloat16())


def test_branches_taken_out_and_shortcuts_turned_to_selections(tmp_path: Path):
    model = autogate.prepare(build(num_classes=10), example(), flops=1.0, shortcuts="conv")
    bank = autogate.gates(model)
    kill(model, 0.5)
    with torch.no_grad():
        for side, classes in bank.channel_map.classes.items():
            if side.tensor.startswith("layer2.1.conv2") and side.dim == 1:
                bank.alpha[classes] = 0
    slim = autogate.finalize(model, warn=False)
    (done,) = history_of(slim).slimmings
    assert done.branches and done.selections
    autogate.save(slim, tmp_path / "slim.safetensors")
    assert_same(autogate.load(tmp_path / "slim.safetensors"), slim, example())


def test_plans_compose(tmp_path: Path):
    path = tmp_path / "slim.safetensors"
    once = slimmed(Halves(), image(), 0.3)
    autogate.save(once, path)
    twice = slimmed(autogate.load(path, Halves()), image(), 0.3, seed=1, shortcuts="conv")
    assert [one.shortcuts for one in history_of(twice).slimmings] == ["shared", "conv"]
    autogate.save(twice, path)
    loaded = autogate.load(path, Halves())
    assert_same(loaded, twice, image())
    thrice = slimmed(loaded, image(), 0.3, seed=2)
    autogate.save(thrice, path)
    assert_same(autogate.load(path, Halves()), thrice, image())


def test_trained_frozen_and_in_eval_mode(tmp_path: Path):
    slim = slimmed(build(num_classes=10), example())
    slim.train()(example()).square().mean().backward()
    torch.optim.SGD(slim.parameters(), lr=0.1).step()
    slim.layer1.requires_grad_(False).eval()
    autogate.save(torch.compile(slim), tmp_path / "slim.safetensors")
    assert_same(autogate.load(tmp_path / "slim.safetensors"), slim, example())


def test_saving_and_loading_leave_random_numbers_alone(tmp_path: Path):
    slim = slimmed(build(num_classes=10), example())
    state = torch.get_rng_state()
    autogate.save(slim, tmp_path / "slim.safetensors")
    autogate.load(tmp_path / "slim.safetensors")
    assert torch.equal(torch.get_rng_state(), state)


def test_the_history_is_out_of_the_way_and_goes_with_copies(tmp_path: Path):
    slim = slim_small()
    assert not any("history" in name for name in (*slim.state_dict(), *dict(slim.named_modules())))
    for twin in (copy.deepcopy(slim), pickle.loads(pickle.dumps(slim))):
        assert history_of(twin) == history_of(slim)
        autogate.save(twin, tmp_path / "slim.safetensors")
        assert_same(autogate.load(tmp_path / "slim.safetensors", small()), slim, image())


@pytest.mark.slow
def test_another_process_with_other_hashes_loads_the_same(tmp_path: Path):
    path = tmp_path / "slim.safetensors"
    slim = slimmed(build(num_classes=10), example(), shortcuts="conv")
    autogate.save(slim, path)
    torch.save(example(), tmp_path / "inputs.pt")
    code = (
        "import sys, hashlib, torch, autogate; torch.set_num_threads(1)\n"
        "with torch.no_grad(): y = autogate.load(sys.argv[1]).eval()(torch.load(sys.argv[2]))\n"
        "print(hashlib.sha256(y.numpy().tobytes()).hexdigest())"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", code, str(path), str(tmp_path / "inputs.pt")]
    got = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.strip()
    (wanted,) = outputs(slim, example())
    assert got == hashlib.sha256(wanted.numpy().tobytes()).hexdigest()


# A model of one's own ------------------------------------------------------------------------------------------------


def test_a_dense_model_that_is_given_becomes_the_slim_one(tmp_path: Path):
    slim = slim_small()
    autogate.save(slim, tmp_path / "slim.safetensors")
    dense = small().double()
    assert autogate.load(tmp_path / "slim.safetensors", dense) is dense
    assert_same(dense, slim, image())
    with pytest.raises(AutogateError, match=r"doesn't say how to build.*Sequential.*model="):
        autogate.load(tmp_path / "slim.safetensors")


def test_a_wrong_model_stays_as_it_was(tmp_path: Path):
    autogate.save(slim_small(), tmp_path / "slim.safetensors")
    wider = nn.Sequential(conv(3, 9, 3), nn.BatchNorm2d(9), *small()[2:])
    other = Net(lambda m, x: m.fc(m.second(m.first(x)).flatten(1)), first=conv(3, 8, 3), second=conv(8, 6, 3))
    shallow = small()
    shallow[2] = nn.Sequential()  # same tensors, another forward
    for model, part in ((wider, "0.weight"), (other, "0.weight")):
        before = {name: id(value) for name, value in model.state_dict(keep_vars=True).items()}
        attributes = [dict(vars(module)) for module in model.modules()]
        with pytest.raises(AutogateError, match=part):
            autogate.load(tmp_path / "slim.safetensors", model)
        assert {name: id(value) for name, value in model.state_dict(keep_vars=True).items()} == before
        assert [dict(vars(module)) for module in model.modules()] == attributes
    with pytest.raises(AutogateError, match="already prepared or slim"):
        autogate.load(tmp_path / "slim.safetensors", slim_small())


class Coupled(nn.Module):
    """Convolutions that add up or don't: the tensors are the same, their channels are coupled otherwise."""

    def __init__(self, add: bool):
        super().__init__()
        torch.manual_seed(0)
        self.add = add
        self.one, self.two, self.fc, self.other = conv(3, 8), conv(3, 8), nn.Linear(8, 2), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        one, two = self.one(x).mean((2, 3)), self.two(x).mean((2, 3))
        return self.fc(one + two) + self.other(one + two) if self.add else self.fc(one) + self.other(two)


def test_a_model_whose_channels_are_coupled_otherwise(tmp_path: Path):
    autogate.save(slimmed(Coupled(False), image()), tmp_path / "slim.safetensors")
    dense = Coupled(True)
    tensors = {name: id(value) for name, value in dense.state_dict(keep_vars=True).items()}
    with pytest.raises(AutogateError, match=r"indices kept of .* differs from the one recorded"):
        autogate.load(tmp_path / "slim.safetensors", dense)
    assert {name: id(value) for name, value in dense.state_dict(keep_vars=True).items()} == tensors


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.one, self.two, self.fc = conv(3, 8), conv(8, 8, 3), conv(8, 8, 3), nn.Linear(8, 2)
        self.two.weight = self.one.weight
        self.again = self.stem
        self.register_buffer("scale", torch.rand(8), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc((self.two(self.one(self.again(x)).relu()) * self.scale.view(-1, 1, 1)).mean((2, 3)))


def test_shared_tensors_stay_shared_and_buffers_that_are_not_saved_are_cut(tmp_path: Path):
    slim = slimmed(Tied(), image())
    assert len(slim.scale) < 8
    autogate.save(slim, tmp_path / "slim.safetensors")
    assert len(load_file(tmp_path / "slim.safetensors")) == len(slim.state_dict()) - 3
    loaded = autogate.load(tmp_path / "slim.safetensors", Tied())
    assert loaded.two.weight is loaded.one.weight and loaded.again is loaded.stem
    assert torch.equal(loaded.scale, slim.scale)
    assert_same(loaded, slim, image())


def words(m: nn.Module, ids: Tensor, *, scale: float, shift: Any = None, places: dict[str, list[Tensor]]) -> Tensor:
    hidden = m.first(m.table(ids) + places["at"][0]).relu() * scale
    return m.second(hidden if shift is None else hidden + shift.value)


def word_net() -> nn.Module:
    torch.manual_seed(0)
    return Net(words, table=nn.Embedding(11, 6), first=nn.Linear(6, 16), second=nn.Linear(16, 3))


class Shift:
    value = 1.0


def test_integer_inputs_and_arguments_that_are_no_tensors(tmp_path: Path):
    inputs = {"ids": torch.randint(0, 11, (2, 5)), "scale": 0.5, "places": {"at": [torch.randn(2, 5, 6)]}}
    slim = slimmed(word_net(), inputs)
    autogate.save(slim, tmp_path / "slim.safetensors")
    assert_same(autogate.load(tmp_path / "slim.safetensors", word_net()), slim, **inputs)


def test_inputs_that_json_cannot_hold_have_to_be_given(tmp_path: Path):
    inputs = {"ids": torch.tensor([[1, 2]]), "scale": 0.5, "shift": Shift(), "places": {"at": [torch.randn(1, 2, 6)]}}
    slim = slimmed(word_net(), inputs)
    autogate.save(slim, tmp_path / "slim.safetensors")
    with pytest.raises(AutogateError, match="example_inputs="):
        autogate.load(tmp_path / "slim.safetensors", word_net())
    assert_same(autogate.load(tmp_path / "slim.safetensors", word_net(), example_inputs=inputs), slim, **inputs)


# How timm builds it --------------------------------------------------------------------------------------------------


def test_arguments_that_cannot_be_read_off_are_asked_for(tmp_path: Path):
    path = tmp_path / "slim.safetensors"
    slim = slimmed(build(act_layer="gelu"), example())
    autogate.save(slim, path)
    with pytest.raises(AutogateError, match=r"builds another model: act1 is torch.nn.*ReLU.*model="):
        autogate.load(path)
    assert_same(autogate.load(path, timm.create_model("resnet18", act_layer="gelu")), slim, example())
    with pytest.raises(AutogateError, match="model_args"):
        autogate.save(slim, path, model_args={"act_layer": "silu"})
    autogate.save(slim, path, model_args={"act_layer": "gelu"})
    assert_same(autogate.load(path), slim, example())


def test_what_is_no_slim_model_is_not_saved(tmp_path: Path):
    path = tmp_path / "slim.safetensors"
    with pytest.raises(AutogateError, match="was not slimmed"):
        autogate.save(small(), path)
    slim = slim_small()
    slim[5].register_buffer("table", torch.zeros(2).to_sparse())
    with pytest.raises(AutogateError, match=r"5\.table: it is \(2,\) now, and was None when the model was finalized"):
        autogate.save(slim, path)
    slim = slim_small()
    slim[2] = nn.GELU()
    with pytest.raises(AutogateError, match=r"2: it is .*GELU.* and was .*ReLU"):
        autogate.save(slim, path)
    with pytest.raises(AutogateError, match="not slim yet"):
        autogate.save(autogate.prepare(slim_small(), image(), flops=1.0), path)
    classifier = slimmed(build(), example())
    classifier.reset_classifier(7)
    with pytest.raises(AutogateError, match=r"fc\.weight"):
        autogate.save(classifier, path)
    assert not list(tmp_path.iterdir())


def test_channels_last_comes_back(tmp_path):
    model = slim_small().to(memory_format=torch.channels_last)
    autogate.save(model, tmp_path / "slim")
    loaded = autogate.load(tmp_path / "slim", small())
    strides = {name: tensor.stride() for name, tensor in model.state_dict().items()}
    assert {name: tensor.stride() for name, tensor in loaded.state_dict().items()} == strides
    assert any(not tensor.is_contiguous() for tensor in loaded.state_dict().values())
