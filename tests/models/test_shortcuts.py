"""`shortcuts="conv"` on real networks, from prepare to the slim model."""

import copy
import pickle

import pytest
import timm
import torch
from torch import nn
from torchvision.models import resnet18

import autogate
from benchmarks.exactness import fvcore_flops
from benchmarks.parts import randomise_norms
from tests.models.test_timm_models import difference, kill, outputs
from tests.rewriters.shortcuts.test_shortcuts import IMAGE, Residual, Stage
from tests.slow import slow_but

NETS = {
    "resnet18": 5, "resnetv2_18": 5, "regnetx_002": 9, "efficientnet_lite0": 9, "mobilenetv2_100": 10,
    "mobilenetv3_small_100": 6, "ese_vovnet39b": 2, "dla34": 8, "hrnet_w18_small": 18, "cspresnet50": 13,
}  # fmt: skip
"""Models with the number of shortcuts that are replaced."""


def build(name: str, **options) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10, **options)
    randomise_norms(model)
    return model.eval(), torch.randn(2, 3, 64, 64)


def groups(model: nn.Module) -> int:
    return len(autogate.gates(model).channel_map.groups())


def replaced(model: nn.Module) -> list[str]:
    return [shortcut.path for shortcut in autogate.gates(model).origin.shortcuts]


@torch.no_grad()
def disturb(model: nn.Module, paths: list[str]) -> None:
    """As training would leave the kernels of these convolutions: no identity any more."""
    for path in paths:
        weight = model.get_submodule(path).weight
        weight.add_(torch.randn_like(weight) / 10)


@pytest.mark.parametrize("name", slow_but(("resnet18", "regnetx_002"), NETS))
def test_blocks_of_real_networks(name):
    model, example = build(name)
    wanted = outputs(model, example)
    shared = groups(autogate.prepare(copy.deepcopy(model), example))
    dense_flops = fvcore_flops(model, example)
    model = autogate.prepare(model, example, shortcuts="conv")
    paths = replaced(model)
    assert len(paths) == NETS[name]
    assert groups(model) == shared + len(paths)
    assert difference(outputs(model, example), wanted) < 1e-5
    summary = autogate.summary(model)
    assert summary.all_flops == dense_flops
    assert [layer.module for layer in summary.shortcuts] == paths
    assert summary.flops == dense_flops + sum(layer.macs for layer in summary.shortcuts)
    assert f"{paths[0]} " in str(summary)

    disturb(model, paths[::2])
    kill(model, (0.1, 0.5, 0.8)[list(NETS).index(name) % 3])
    before = outputs(model, example)
    slim = autogate.finalize(model, warn=False)
    assert difference(outputs(slim, example), before) <= 1e-5


def test_convnext_blocks_can_be_named():
    model, example = build("convnext_atto")
    wanted = outputs(model, example)
    model = autogate.prepare(model, example, shortcuts=["stages.1"])
    assert replaced(model) == [f"stages.1.blocks.{i}.shortcut_conv" for i in range(2)]
    assert difference(outputs(model, example), wanted) < 1e-5
    disturb(model, replaced(model))
    kill(model, 0.5)
    before = outputs(model, example)
    assert difference(outputs(autogate.finalize(model, warn=False), example), before) <= 1e-5


def test_where_nothing_is_to_be_replaced_that_is_said():
    model, example = build("convnext_atto")  # where embeddings stay, so do all channels that its shortcuts lead along
    with pytest.warns(UserWarning, match="ConvNeXt: shortcuts='conv' changed nothing"):
        autogate.prepare(model, example, shortcuts="conv", embed=False, flops=0.9)


def test_each_convnext_block_has_a_width_of_its_own():
    model, example = build("test_convnext")
    wanted = outputs(model, example)
    model = autogate.prepare(model, example, shortcuts="conv")
    paths = replaced(model)
    assert paths and all(path.endswith("shortcut_conv") for path in paths)
    assert torch.equal(outputs(model, example), wanted)
    classes = autogate.gates(model).channel_map.classes
    assert not set(classes[(f"{paths[0]}.weight", 0)].tolist()) & set(classes[(f"{paths[0]}.weight", 1)].tolist())
    disturb(model, paths[::2])
    kill(model, 0.5)
    before = outputs(model, example)
    slim = autogate.finalize(model, warn=False)
    assert difference(outputs(slim, example), before) <= 1e-5
    assert not any("live_statistic" in path for path, _ in slim.named_modules())


def test_torchvisions_blocks():
    torch.manual_seed(0)
    model, example = resnet18(num_classes=10).eval(), torch.randn(2, 3, 64, 64)
    wanted = outputs(model, example)
    model = autogate.prepare(model, example, shortcuts="conv")
    assert replaced(model) == [f"layer{i}.{j}.shortcut_conv" for i, j in ((1, 0), (1, 1), (2, 1), (3, 1), (4, 1))]
    assert difference(outputs(model, example), wanted) < 1e-5
    kill(model, 0.5)
    before = outputs(model, example)
    assert difference(outputs(autogate.finalize(model, warn=False), example), before) <= 1e-5


@pytest.mark.parametrize("name", slow_but(["resnet18"], ["resnet18", "regnetx_002", "dla34"]))
def test_nothing_pruned_gives_the_original_model_back(name):
    model, example = build(name)
    state, wanted = model.state_dict(), outputs(model, example)
    names = [path for path, _ in model.named_modules()]
    autogate.finalize(autogate.prepare(model, example, shortcuts="conv"), warn=False)
    assert [path for path, _ in model.named_modules()] == names
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert not any("forward" in module.__dict__ for module in model.modules())
    assert torch.equal(outputs(model, example), wanted)


def of_one_block(kernel: str) -> tuple[nn.Module, torch.Tensor]:
    """A prepared net of one block, its gates closed so that the shortcut's kernel comes to what is asked."""
    torch.manual_seed(0)
    model = autogate.prepare(Stage(Residual(8), Residual(8)).eval(), IMAGE, flops=1.0, shortcuts="conv")
    bank = autogate.gates(model)
    into = bank.channel_map.classes[next(s for s in bank.channel_map.classes if s.tensor == "stem.weight")]
    out = bank.channel_map.classes[next(s for s in bank.channel_map.classes if s.tensor == "blocks.0.conv2.weight")]
    dead_in, dead_out = {
        "identity": ([1, 5], [1, 5]),
        "selection": ([], [1, 5]),
        "zero-filled": ([1, 5], []),
        "crossed": ([1, 5], [0, 5]),
        "empty": ([0, 1, 2, 3], [4, 5, 6, 7]),
        "convolution": ([1], [1]),
    }[kernel]
    if kernel == "convolution":
        disturb(model, ["blocks.0.shortcut_conv"])
    with torch.no_grad():
        bank.alpha[into[dead_in]] = 0
        bank.alpha[out[dead_out]] = 0
    return model, outputs(model, IMAGE)


@pytest.mark.parametrize("kernel", ["identity", "selection", "zero-filled", "crossed", "empty", "convolution"])
def test_a_shortcut_is_given_back_as_what_its_kernel_came_to(kernel):
    model, wanted = of_one_block(kernel)
    slim = autogate.finalize(model, warn=False)
    block = slim.blocks[0]
    assert hasattr(block, "shortcut_conv") == (kernel == "convolution")
    assert hasattr(block, "shortcut_conv_index") == (kernel in ("selection", "zero-filled", "crossed", "empty"))
    assert ("forward" in block.__dict__) == (kernel != "identity")
    assert difference(outputs(slim, IMAGE), wanted) <= 1e-5
    for copied in (copy.deepcopy(slim), pickle.loads(pickle.dumps(slim))):
        assert torch.equal(outputs(copied, IMAGE), outputs(slim, IMAGE))


def test_a_slim_model_with_selections_can_be_prepared_again():
    model, _ = of_one_block("crossed")
    slim = autogate.finalize(model, warn=False)
    again = autogate.prepare(slim, IMAGE)
    kill(again, 0.4)
    wanted = outputs(again, IMAGE)
    assert difference(outputs(autogate.finalize(again, warn=False), IMAGE), wanted) <= 1e-5


class Chunked(nn.Module):
    """A residual block whose forward holds a size."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(8, 16, 1), nn.Conv2d(8, 8, 1)

    def forward(self, x):
        y = self.conv1(x)
        return x + self.conv2(y[:, :8] * y[:, 8:].sigmoid())


def test_a_forward_that_an_earlier_slimming_rewrote_is_given_back():
    model = Stage(Chunked(), Residual(8)).eval()
    kill(autogate.prepare(model, IMAGE), 0.3)
    slim = autogate.finalize(model, warn=False)
    before, wanted = slim.blocks[0].__dict__["forward"], outputs(slim, IMAGE)
    autogate.finalize(autogate.prepare(slim, IMAGE, shortcuts="conv"), warn=False)
    assert slim.blocks[0].__dict__["forward"] is before
    assert torch.equal(outputs(slim, IMAGE), wanted)


def test_a_rewritten_forward_with_its_shortcut_given_back():
    model = autogate.prepare(Stage(Chunked(), Residual(8)).eval(), IMAGE, shortcuts="conv")
    bank = autogate.gates(model)
    inner = bank.channel_map.classes[next(s for s in bank.channel_map.classes if s.tensor == "blocks.0.conv1.weight")]
    with torch.no_grad():
        bank.alpha[inner[:3]] = 0
    wanted = outputs(model, IMAGE)
    slim = autogate.finalize(model, warn=False)
    assert not hasattr(slim.blocks[0], "shortcut_conv")
    assert slim.blocks[0].conv2.in_channels == 5
    assert difference(outputs(slim, IMAGE), wanted) <= 1e-5


def test_the_target_is_a_share_of_the_model_without_the_convolutions_and_is_met():
    torch.manual_seed(0)
    model = Stage(*(Residual(16) for _ in range(3)), width=16)
    dense = autogate.summary(autogate.prepare(copy.deepcopy(model), IMAGE)).all_flops
    model = autogate.prepare(model, IMAGE, flops=0.5, steps=200, shortcuts="conv")
    bank = autogate.gates(model)
    assert bank.progress().shares["FLOPs"] > 1
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for _ in range(200):
        optimizer.zero_grad()
        model(torch.randn(4, 3, 8, 8)).square().mean().backward()
        optimizer.step()
    assert 0.49 <= bank.progress().shares["FLOPs"] <= 0.51
    assert autogate.summary(model).flops == pytest.approx(bank.progress().shares["FLOPs"] * dense)
    wanted = outputs(model, IMAGE)
    slim = autogate.finalize(model)
    assert difference(outputs(slim, IMAGE), wanted) <= 1e-5
    assert fvcore_flops(slim, IMAGE) <= 0.51 * dense


def test_the_share_of_one_asks_for_what_the_convolutions_cost():
    torch.manual_seed(0)
    model = autogate.prepare(Stage(*(Residual(16) for _ in range(3)), width=16), IMAGE, flops=1.0, steps=100,
                             shortcuts="conv")  # fmt: skip
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(100):
        optimizer.zero_grad()
        model(torch.randn(4, 3, 8, 8)).square().mean().backward()
        optimizer.step()
    assert 0.98 <= autogate.gates(model).progress().shares["FLOPs"] <= 1.01


def test_drop_path_and_hooks_of_a_block_stay():
    model, example = build("resnet18", drop_path_rate=0.3)
    seen = []
    model.layer1[0].register_forward_hook(lambda module, args, output: seen.append(output.shape))

    def trained() -> torch.Tensor:
        torch.manual_seed(5)
        return copy.deepcopy(model).train()(example)

    wanted = trained()
    autogate.prepare(model, example, shortcuts="conv")
    seen.clear()
    torch.testing.assert_close(trained(), wanted, rtol=1e-4, atol=1e-4)
    assert len(seen) == 1


def test_an_optimizer_from_before_prepare_is_told_of():
    model = Stage(Residual(8), Residual(8))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    autogate.prepare(model, IMAGE, steps=10, shortcuts="conv")

    def step():
        model(IMAGE).square().mean().backward()
        optimizer.step()

    step()
    with pytest.warns(UserWarning, match=r"blocks\.0\.shortcut_conv\.weight.*after autogate\.prepare"):
        step()


@pytest.mark.parametrize(
    ("shortcuts", "message"),
    [
        ("convs", "shortcuts is 'convs'.*'conv'"),
        (["blocks.9"], "shortcuts names 'blocks.9'.*'blocks"),
        (["stem"], "stem: it holds no identity shortcut"),
    ],
)
def test_a_wrong_argument_leaves_the_model_as_it_was(shortcuts, message):
    model = Stage(Residual(8), Residual(8))
    names = [path for path, _ in model.named_modules()]
    with pytest.raises(autogate.AutogateError, match=message):
        autogate.prepare(model, IMAGE, shortcuts=shortcuts)
    assert [path for path, _ in model.named_modules()] == names


def test_a_target_out_of_reach_takes_the_convolutions_out_again():
    model = Stage(Residual(8), Residual(8))
    with pytest.raises(autogate.AutogateError, match="can't be reached"):
        autogate.prepare(model, IMAGE, flops=1e-6, ignore=["blocks.0"], shortcuts=["blocks.1"])
    assert not hasattr(model.blocks[1], "shortcut_conv")
    assert "forward" not in model.blocks[1].__dict__
