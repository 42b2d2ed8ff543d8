"""Bad input is refused with the place, the cause and what to do; the model stays as it was."""

import copy
import warnings

import pytest
import timm
import torch
from torch import nn

import autogate
from autogate import AutogateError


def net(**options) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("test_resnet", num_classes=10, **options)


def example() -> torch.Tensor:
    return torch.randn(2, 3, 32, 32)


def refused(model, *args, **kwargs) -> str:
    """The message with which prepare refuses; checks that the model is as it was."""
    before = copy.deepcopy(model) if isinstance(model, nn.Module) else None
    with pytest.raises(AutogateError) as error:
        autogate.prepare(model, *args, **kwargs)
    if before is not None:
        assert_same(model, before)
    return str(error.value)


def assert_same(model: nn.Module, before: nn.Module) -> None:
    assert [name for name, _ in model.named_modules()] == [name for name, _ in before.named_modules()]
    for (name, value), (_, wanted) in zip(model.state_dict().items(), before.state_dict().items(), strict=True):
        assert torch.equal(value, wanted), name
    assert [module.training for module in model.modules()] == [module.training for module in before.modules()]
    assert all(len(m._forward_pre_hooks) == len(b._forward_pre_hooks)
               for m, b in zip(model.modules(), before.modules(), strict=True))  # fmt: skip


def test_not_a_module():
    assert "not a torch.nn.Module" in refused("resnet50")


def test_no_example_input_to_be_had():
    message = refused(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3)))
    assert "example_inputs" in message
    assert "Sequential" in message


def test_example_of_the_wrong_kind():
    assert "is of type str" in refused(net(), "image.png")


@pytest.mark.parametrize("wrong", [torch.randn(2, 5, 32, 32), torch.randint(9, (2, 3, 32, 32)), torch.randn(2, 3)])
def test_wrong_shape_or_dtype_names_the_module(wrong):
    message = refused(net(), wrong)
    assert message.startswith("stem") or message.startswith("conv")
    assert "example inputs" in message


def test_already_prepared():
    model = autogate.prepare(net(), example())
    with pytest.raises(AutogateError, match="already prepared"):
        autogate.prepare(model, example())


def test_a_wrapper_is_not_prepared():
    assert "wrapper" in refused(nn.DataParallel(net()), example())


@pytest.mark.parametrize("flops", [0.0, -1.0, 1.5, float("nan")])
def test_flops_outside_their_range(flops):
    assert "flops" in refused(net(), example(), flops=flops)


def test_steps_must_be_positive():
    assert "steps" in refused(net(), example(), steps=0)


def test_a_share_out_of_reach_names_the_least_and_what_keeps_it():
    message = refused(net(), example(), flops=0.1, ignore=["layer2", "layer3", "layer4"])
    assert "0.100 of the FLOPs can't be reached: 0.254 are left" in message
    assert "layer2.0.conv1: the caller asked for it" in message


def test_unknown_name_in_ignore_suggests_the_near_ones():
    assert "'layer1.0.conv1'" in refused(net(), example(), ignore=["layer1.0.conv_1"])


def test_ignored_modules_keep_their_channels():
    model = autogate.prepare(net(), example(), ignore=["layer1.0.conv1"])
    assert not any(side.tensor.startswith("layer1.0.conv1") for side in autogate.gates(model).channel_map.classes)
    assert any(pin.reason == "the caller asked for it" for pin in autogate.summary(model).pins)


class ByValue(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3)

    def forward(self, x):
        y = self.a(x)
        if y.mean() > 0:  # the line to be named
            y = y * 2
        return self.b(y)


def test_data_dependent_control_flow_names_the_line():
    message = refused(ByValue(), example())
    assert "if y.mean() > 0" in message
    assert "test_api_errors.py" in message
    assert "torch.where" in message


def test_nothing_that_can_go():
    message = refused(nn.Sequential(nn.Conv2d(3, 8, 3)), example())
    assert "none of its channels can be removed" in message


def test_finalize_without_prepare_and_twice():
    model = net()
    with pytest.raises(AutogateError, match="not prepared"):
        autogate.finalize(model)
    slim = autogate.finalize(autogate.prepare(model, example()), warn=False)
    with pytest.raises(AutogateError, match="already finalized"):
        autogate.finalize(slim)


def refused_at_the_end(model: nn.Module) -> str:
    before = copy.deepcopy(model)
    with pytest.raises(AutogateError) as error:
        autogate.finalize(model)
    assert [name for name, _ in model.named_modules()] == [name for name, _ in before.named_modules()]
    assert autogate.gates(model) is model.autogate
    assert len(model._forward_pre_hooks) == 1
    return str(error.value)


def test_a_weight_that_is_not_finite_is_named():
    model = autogate.prepare(net(), example())
    with torch.no_grad():
        model.layer1[0].conv1.weight[0, 0, 0, 0] = float("nan")
    assert "layer1.0.conv1.weight" in refused_at_the_end(model)


def test_a_buffer_may_hold_an_infinity():
    model = net()
    model.register_buffer("most", torch.tensor(float("inf")))
    slim = autogate.finalize(autogate.prepare(model, example(), flops=1.0), warn=False)
    assert slim.most == float("inf")


def test_a_gate_that_is_not_finite_is_named():
    model = autogate.prepare(net(), example())
    with torch.no_grad():
        autogate.gates(model).alpha[3] = float("inf")
    assert "not finite" in refused_at_the_end(model)


def test_a_layer_swapped_between_prepare_and_finalize_is_named():
    model = autogate.prepare(net(), example())
    old = model.layer2[0].conv1
    model.layer2[0].conv1 = nn.Conv2d(old.in_channels, old.out_channels, 1, old.stride, 0, bias=False)
    assert "layer2.0.conv1" in refused_at_the_end(model)


def test_stopping_early_warns_with_the_numbers():
    model = autogate.prepare(net(), example(), flops=0.5, steps=100)
    with pytest.warns(autogate.BudgetNotMetWarning, match=r"0 of 100 steps: 100\.0% of the FLOPs .* 50\.0%"):
        autogate.finalize(model)


def test_finalize_looks_through_wrappers():
    model = autogate.prepare(net(), example())
    assert autogate.finalize(nn.DataParallel(model), warn=False) is model


def test_a_target_that_leaves_a_constant_network_is_refused():
    """In steps of sixteen channels a tenth of the FLOPs leaves no channel in some layer."""
    model, example = timm.create_model("test_resnet", num_classes=4), torch.randn(2, 3, 32, 32)
    with pytest.raises(
        AutogateError, match=r"0\.100 of the FLOPs.*: 0\.411 are left .*least width: 16 channels at a time.*round_to"
    ):
        autogate.prepare(model, example, flops=0.1, round_to=16)
    assert not hasattr(model, "autogate")
    autogate.prepare(model, example, flops=0.1)


def test_around_a_prepared_model():
    model = nn.Sequential(nn.Conv2d(3, 3, 1), autogate.prepare(net(), example()))
    message = refused(model, example())
    assert "its '1' is already prepared" in message and "finalize" in message


def test_inside_of_a_prepared_model():
    model = autogate.prepare(net(), example())
    with pytest.raises(AutogateError, match=r"its 0\.conv1\.weight has gates already"):
        autogate.prepare(model.layer1, torch.randn(2, 32, 8, 8))
    assert not hasattr(model.layer1, "autogate")
    autogate.prepare(copy.deepcopy(model.layer1), torch.randn(2, 32, 8, 8))


@pytest.mark.parametrize("share", ["0.5", True, [0.5]])
def test_a_share_that_is_no_number(share):
    message = refused(net(), example(), flops=share)
    assert f"flops is {share!r}, of type {type(share).__name__}; a share must be a number" in message


class Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1)

    def forward(self, pixel_values):
        return self.second(self.first(pixel_values))


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"pixels": torch.randn(2, 3, 4, 4)}, "its forward doesn't take the keys ['pixels']: missing a required"),
        ((torch.randn(2, 3, 4, 4), 1), "its forward doesn't take 2 arguments: too many positional arguments"),
        ((2, 3, 32, 32), "example_inputs is a shape, (2, 3, 32, 32), and not a tensor. Pass torch.randn(2, 3, 32, 32)"),
        ([2, 3], "example_inputs is a shape, (2, 3)"),
        (("a",), "the forward fails on the example inputs"),
    ],
)
def test_inputs_that_the_forward_does_not_take(inputs, message):
    found = refused(Named(), inputs)
    assert message in found and "at ." not in found


def test_a_layer_replaced_by_one_that_makes_fewer_channels_is_named():
    """What reads these channels would fail first, and nobody would know why."""
    model = autogate.prepare(net(), example())
    model.layer1[0].conv1 = nn.Conv2d(32, 16, 3, padding=1, bias=False)
    with pytest.raises(AutogateError, match=r"layer1\.0\.conv1\.weight: this layer has changed since"):
        autogate.finalize(model)


def test_a_layer_replaced_by_a_wider_one_is_named():
    model = autogate.prepare(net(), example())
    model.layer2[0].conv2 = nn.Conv2d(64, 48, 3, padding=1)
    with pytest.raises(AutogateError, match=r"layer2\.0\.conv2\.weight: its shape is \(48, 64, 3, 3\) now") as error:
        autogate.finalize(model)
    assert "Change layers before prepare" in str(error.value)
    with pytest.raises(AutogateError, match="its shape is"):
        model(example())
    other = autogate.prepare(net(), example())  # it is nobody else's error
    other(example()).sum().backward()
    torch.optim.SGD(other.parameters(), 0.1).step()
    assert autogate.gates(other).progress().step == 1


def test_layers_without_shapes():
    with pytest.raises(AutogateError, match=r"0\.weight: it belongs to a lazy layer.* Run the model on an input first"):
        autogate.prepare(nn.Sequential(nn.LazyConv2d(8, 1), nn.Conv2d(8, 4, 1)), example())


def test_a_model_prepared_for_quantization_is_told_where_to_read_on():
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1)).train()
    model.qconfig = torch.ao.quantization.get_default_qat_qconfig()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.ao.quantization.prepare_qat(model, inplace=True)
    assert "docs/quantization.md" in refused(model, example())


def test_a_refusal_says_what_to_do():
    class Softmax(nn.Sequential):
        def forward(self, x):
            return self[1](self[0](x).softmax(1))

    message = refused(Softmax(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1)), example())
    assert "the model: mixed along its channels" in message and "docs/troubleshooting.md" in message
    with pytest.raises(AutogateError, match=r"Take layers out of `ignore`"):
        autogate.prepare(net(), example(), ignore=[name for name, _ in net().named_children()])
