"""What `autogate inspect` reports, and its errors."""

import re
from pathlib import Path

import pytest
import timm
import torch
from typer.testing import CliRunner

import autogate
from autogate.budget.products import Flops
from autogate.cli import app, common
from autogate.inspection import draw_coupling_graph, inspect_model, short
from benchmarks.exactness import fvcore_flops

SMALL = ("--image-size", "64", "--classes", "10")


def small() -> tuple[torch.nn.Module, torch.Tensor]:
    return timm.create_model("resnet18", num_classes=10), torch.randn(2, 3, 64, 64)


def invoke(*words: str):
    return CliRunner().invoke(app, ["inspect", *words])


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(common.console, "width", 200)


def test_flops_of_stages_add_up_and_the_budget_is_met():
    model, example = small()
    found = inspect_model(model, example, flops=0.5)
    assert sum(stage.all_flops for stage in found.stages) == found.all_flops == fvcore_flops(model, example)
    assert sum(stage.flops for stage in found.stages) == found.flops
    assert 0.47 < found.flops / found.all_flops <= 0.5
    assert [stage.name for stage in found.stages] == ["conv1", "layer1", "layer2", "layer3", "layer4", "fc"]
    assert found.all_params == sum(parameter.numel() for parameter in model.parameters())
    assert inspect_model(model, example, flops=1.0).flops == found.all_flops


def test_heads_are_called_heads():
    told = invoke("test_vit")
    assert told.exit_code == 0, told.output
    assert re.search(r"│ 1 +│ +2 heads │ blocks.0.attn.qkv ", told.output)


def test_a_groups_price_is_what_one_of_its_channels_costs():
    model, example = small()
    found = inspect_model(model, example)
    (wide,) = (group for group in found.groups if "layer1.1.conv2" in group.made_by)
    assert wide.made_by == ("conv1", "layer1.0.conv2", "layer1.1.conv2") and wide.width == 64
    assert "layer2.0.conv1" in wide.read_by and "conv1" not in wide.read_by
    live = torch.ones(found.channel_map.size, dtype=torch.bool)
    cost = Flops(found.channel_map)
    live[found.channel_map.groups()[found.groups.index(wide)].classes[5]] = False
    assert wide.price == found.all_flops - float(cost.value(live))


def test_with_convolutions_on_the_shortcuts_and_the_model_as_it_was():
    model, example = small()
    before = {name: id(value) for name, value in model.state_dict(keep_vars=True).items()}
    shared, freed = (inspect_model(model, example, shortcuts=how) for how in ("shared", "conv"))
    assert len(freed.groups) == len(shared.groups) + 5
    assert freed.all_flops == shared.all_flops
    assert {name: id(value) for name, value in model.state_dict(keep_vars=True).items()} == before


def test_the_command_tells_groups_pins_stages_and_the_budget(tmp_path: Path):
    told = invoke("resnet18", *SMALL, "--graph", str(tmp_path / "groups.svg"))
    assert told.exit_code == 0, told.output
    for words in ("layer1.0.conv1", "the model returns it", "layer4", "of its channels, ", "groups.svg"):
        assert words in told.output
    picture = (tmp_path / "groups.svg").read_text()
    assert "layer4.1.conv2" in picture
    model, example = small()
    groups = inspect_model(model, example).groups
    labels = [f"{number}: {group.width}" for number, group in enumerate(groups)]  # as in the table
    assert [label for label in labels if not re.search(rf"\b{label}\b", picture)] == []
    by_layer = invoke("resnet18", *SMALL, "--layers", "--ignore", "layer4")
    rows = [[line.startswith("│ layer3.0.conv1 ") for line in one.output.splitlines()] for one in (told, by_layer)]
    assert [sum(found) for found in rows] == [0, 1]
    assert "the caller asked for it" in by_layer.output


def test_a_slim_file_can_be_inspected(tmp_path: Path):
    model, example = small()
    slim = autogate.finalize(autogate.prepare(model, example), warn=False)
    autogate.save(slim, tmp_path / "slim.safetensors")
    assert invoke(str(tmp_path / "slim.safetensors"), "--image-size", "64").exit_code == 0


def test_a_slim_file_is_counted_at_the_size_that_it_was_prepared_with(slim: Path):
    """64 pixels, where timm's configuration says 160."""
    found = inspect_model(autogate.load(slim), torch.randn(2, 3, 64, 64))
    told = invoke(str(slim))
    assert f"of {short(found.all_flops)} FLOPs" in " ".join(told.output.split())


def test_a_budget_out_of_reach_is_an_error_as_it_is_for_prepare():
    words = ("resnet18", *SMALL, "--ignore", "layer1", "--flops", "0.1")
    told = invoke(*words)
    assert told.exit_code == 1 and "Removable channels" in told.output
    text = " ".join(told.output.split())
    least = re.search(r"10\.0% of the FLOPs can't be reached: (\d+\.\d)% are left with the fewest channels", text)
    assert least and f"leave {least[1]}% of" in text
    model, example = small()
    with pytest.raises(autogate.AutogateError, match=f"{float(least[1]) / 100:.3f} are left"):
        autogate.prepare(model, example, ignore=["layer1"], flops=0.1)
    just = invoke(*words[:-1], str(float(least[1]) / 100 + 0.001))
    assert just.exit_code == 0


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        (["resnet5O"], 2, "Did you mean resnet50"),
        (["resnet18", "--image-size", "0"], 2, "image-size"),
        (["resnet18", *SMALL, "--flops", "3"], 1, "flops is 3.0"),
        (["resnet18", *SMALL, "--ignore", "layer9"], 1, "Did you mean"),
        (["resnet18", *SMALL, "--shortcuts", "layer9"], 1, "it holds no identity shortcut"),
        (["resnet18", *SMALL, "--graph", "groups.odd"], 1, "groups.odd: no picture is drawn in the format '.odd'"),
        (["nothere.safetensors"], 2, "there is no file nothere.safetensors"),
        (["some/folder"], 2, "there is no file some/folder"),
        (["resnet18", *SMALL, "--graph", "no/such/folder/groups.svg"], 1, "No such file"),
    ],
)
def test_what_is_wrong_is_told_without_a_traceback(words: list[str], code: int, told: str):
    result = invoke(*words)
    assert result.exit_code == code
    assert told in result.output
    assert "Traceback" not in result.output
    if code == 1:
        assert isinstance(invoke(*words, "--debug").exception, (autogate.AutogateError, OSError))


@pytest.mark.parametrize(
    "command", [[], *([name] for name in ("inspect", "export", "bench", "demo", "train", "finalize", "report"))]
)
def test_help_has_an_example(command: list[str]):
    result = CliRunner().invoke(app, [*command, "--help"], env={"COLUMNS": "200"})
    assert result.exit_code == 0
    assert not command or "Example: autogate" in result.output


def test_a_model_of_which_nothing_may_go_is_drawn_too(tmp_path: Path):
    found = inspect_model(torch.nn.Sequential(torch.nn.Linear(3, 2)), torch.randn(2, 3))
    assert not found.groups and found.least == 1.0
    draw_coupling_graph(found.channel_map, tmp_path / "groups.png")
