"""timm's functions work on a slim timm model."""

from importlib import resources
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from timm.models import adapt_model_from_string
from torch import nn

import autogate
from autogate import AutogateError
from autogate.files.timm_text import read_timm_text
from tests.models.test_timm_models import build, difference, kill, outputs
from tests.slow import slow_but

PRUNED = (
    "ecaresnet50d_pruned", "ecaresnet101d_pruned", "efficientnet_b1_pruned", "efficientnet_b2_pruned",
    "efficientnet_b3_pruned",
)  # fmt: skip
"""Models that timm ships pruned, each with a text of its shapes."""


def slimmed(name: str, share: float = 0.4, **options) -> tuple[nn.Module, torch.Tensor]:
    model, example = build(name, **options)
    model = autogate.prepare(model, example, flops=1.0)
    kill(model, share)
    return autogate.finalize(model, warn=False).eval(), example


def test_what_timms_validate_asks_of_a_model(tmp_path: Path):
    slim, _ = slimmed("mobilenetv3_small_100")
    dense = timm.create_model("mobilenetv3_small_100")
    autogate.save(slim, tmp_path / "slim.safetensors")
    for model in (slim, autogate.load(tmp_path / "slim.safetensors")):
        assert model.pretrained_cfg == dense.pretrained_cfg and model.default_cfg == dense.default_cfg
        config = resolve_model_data_config(model)
        assert config == resolve_model_data_config(dense)
        image = create_transform(**config)(Image.new("RGB", (300, 280)))
        assert model(image[None]).shape == (1, model.num_classes)
        assert model.get_classifier().out_features == 1000


@pytest.mark.parametrize(
    "name",
    slow_but(["mobilenetv3_small_100"], ["resnet18", "efficientnet_b0", "mobilenetv3_small_100", "efficientvit_b0"]),
)
def test_the_classifier_can_be_exchanged_after_slimming(name: str):
    slim, example = slimmed(name)
    features = slim.forward_features(example)
    assert features.shape[1] == slim.num_features
    slim.reset_classifier(7)
    assert outputs(slim, example).shape == (2, 7)
    assert torch.equal(slim.forward_features(example), features)
    slim.reset_classifier(0)
    assert outputs(slim, example).shape == (2, slim.head_hidden_size)


@pytest.mark.parametrize("name", slow_but(["mobilenetv3_small_100"], ["resnet18", "mobilenetv3_small_100"]))
def test_models_that_give_features(name: str):
    model, example = build(name, features_only=True)
    model = autogate.prepare(model, example, flops=1.0)
    kill(model, 0.4)
    before = outputs(model, example)
    params = sum(parameter.numel() for parameter in model.parameters())
    slim = autogate.finalize(model, warn=False)
    assert sum(parameter.numel() for parameter in slim.parameters()) < 0.9 * params
    after = outputs(slim, example)
    assert all(difference(a, b) <= 1e-5 for a, b in zip(after, before, strict=True))
    assert [feature.shape[1] for feature in after] == slim.feature_info.channels()


def test_a_state_dict_is_saved_and_loaded_as_ever(tmp_path: Path):
    slim, example = slimmed("mobilenetv3_small_100")
    torch.save(slim.state_dict(), tmp_path / "slim.pt")
    other, _ = slimmed("mobilenetv3_small_100")
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    other.load_state_dict(torch.load(tmp_path / "slim.pt", weights_only=True))
    assert torch.equal(outputs(other, example), outputs(slim, example))


@pytest.mark.parametrize("name", slow_but(["mobilenetv2_100"], ["resnet18", "mobilenetv2_100"]))
def test_timm_makes_the_slim_model_of_its_text(name: str):
    slim, example = slimmed(name)
    text = autogate.to_timm_text(slim)
    narrow = adapt_model_from_string(timm.create_model(name), text)
    narrow.load_state_dict(slim.state_dict())
    assert torch.equal(outputs(narrow, example), outputs(slim, example))


@pytest.mark.parametrize("name", slow_but(["ecaresnet50d_pruned", "efficientnet_b1_pruned"], PRUNED))
def test_texts_that_timm_ships(name: str):
    shipped = resources.files("timm.models").joinpath(f"_pruned/{name}.txt").read_text()
    shapes = read_timm_text(shipped)
    model = timm.create_model(name)
    ours = autogate.to_timm_text(model)
    if name.startswith("efficientnet"):
        assert ours == shipped.strip()
    else:  # weights alone, and masks that belong to no layer
        own = {key: shape for key, shape in shapes.items() if not key.endswith("_M.weight")}
        assert len(shapes) - len(own) == 4
        assert own == {key: shape for key, shape in read_timm_text(ours).items() if key.endswith(".weight")}
    narrow = adapt_model_from_string(timm.create_model(name.removesuffix("_pruned")), ours)
    assert {key: value.shape for key, value in narrow.state_dict().items()} == {
        key: value.shape for key, value in model.state_dict().items()
    }


@pytest.mark.parametrize(
    ("name", "part"),
    [
        pytest.param("cspresnet50", r"^stages\.\d+.*: its forward was rewritten", marks=pytest.mark.slow),
        pytest.param("resnext50_32x4d", r"^layer1\.\d\.conv2.*timm makes it", marks=pytest.mark.slow),
        ("vit_tiny_patch16_224", r"its forward was rewritten|timm makes it"),
    ],
)
def test_what_a_text_of_shapes_cannot_tell(name: str, part: str):
    slim, _ = slimmed(name, **({"img_size": 64, "depth": 2} if "vit" in name else {}))
    with pytest.raises(AutogateError, match=part):
        autogate.to_timm_text(slim)


def test_a_dense_model_of_ones_own_for_the_text():
    slim, _ = slimmed("resnet18", act_layer="gelu")
    with pytest.raises(AutogateError, match=r"to_timm_text\(slim, dense\)"):
        autogate.to_timm_text(slim)
    assert autogate.to_timm_text(slim, timm.create_model("resnet18", act_layer="gelu")).startswith("conv1.weight:[")


@pytest.mark.parametrize("text", ["", "conv", "conv:3", "conv:[3", ":[3]", "a:[x]", "a:[1]**b:[2]", "a:[-1]"])
def test_what_is_no_text_of_shapes(text: str):
    with pytest.raises(AutogateError, match="not an entry"):
        read_timm_text(text)
