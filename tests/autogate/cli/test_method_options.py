"""Options for methods and limits: what they ask for ends in the run's recipe."""

import dataclasses

import pytest
import typer
from typer.testing import CliRunner

import autogate
from autogate.cli import app
from autogate.cli.method_options import asked_method, read_limits
from autogate.slim.history import history_of
from autogate.training import RunFolder
from autogate.training.checkpoint import load_checkpoint
from tests.autogate.cli.test_train import SMALL


def test_fields_of_a_method_are_options():
    assert asked_method({"method": "gdp"}) == "GDP()"
    assert asked_method({"method": "gdp", "reach": 0.2, "keep": None}) == "GDP(reach=0.2)"
    assert asked_method({"method": "clipped-lasso", "a": float("inf")}) == "ClippedLasso(a=inf)"
    with pytest.raises(typer.BadParameter, match="setting of clipped-lasso"):
        asked_method({"method": "gdp", "a": 0.3})
    with pytest.raises(typer.BadParameter, match="gdp or clipped-lasso"):
        asked_method({"method": "lasso"})


def test_limits_are_names_with_one_number_or_two():
    assert read_limits(["layer1=0.8", "layer4.*.conv2=0.25:1"]) == {"layer1": 0.8, "layer4.*.conv2": (0.25, 1.0)}
    for text in ("layer1", "=0.5", "layer1=wide"):
        with pytest.raises(typer.BadParameter, match="is not NAME=LEAST"):
            read_limits([text])


def test_the_help_lists_them():
    told = CliRunner(env={"COLUMNS": "200"}).invoke(app, ["train", "--help"]).output
    for option in ("--method", "--reach", "--alpha-rate", "--a ", "--limit"):
        assert option in told


@pytest.mark.slow
def test_the_published_method_is_asked_for_by_its_fields(pictures, tmp_path):
    words = ["--lam", 2e-3, "--epsilon-factor", 0.5, "--relative-rate", 0.1, "--bound", "inf", "--nearly-closed", 1]
    told = CliRunner(env={"COLUMNS": "200"}).invoke(
        app, list(map(str, ["train", "test_resnet", "--data", pictures, *SMALL[:-2], *words, "--no-weighed",
                            "--epochs", 2, "--out", tmp_path / "run"])),
    )  # fmt: skip
    assert told.exit_code == 0, told.output
    info, gates = RunFolder(tmp_path / "run").info(), load_checkpoint(tmp_path / "run" / "last.pt").model
    published = autogate.GDP.published(lam=2e-3, epochs=2, steps_per_epoch=info.steps_per_epoch, epsilon_factor=0.5)
    asked = eval(info.recipe.method, {"GDP": autogate.GDP, "inf": float("inf")})
    assert dataclasses.replace(asked, epochs=2, steps_per_epoch=info.steps_per_epoch) == published
    assert gates["autogate.epsilon"] == 0.1 * 0.5**2  # once an epoch of the run


@pytest.mark.slow
def test_a_run_has_its_method_and_limits(pictures, tmp_path):
    words = ["--method", "clipped-lasso", "--a", "inf", "--limit", "layer1=0.5:0.9", "--epochs", 1]
    told = CliRunner(env={"COLUMNS": "200"}).invoke(
        app, list(map(str, ["train", "test_resnet", "--data", pictures, *SMALL, *words, "--out", tmp_path / "run"]))
    )
    assert told.exit_code == 0, told.output
    recipe = RunFolder(tmp_path / "run").info().recipe
    assert recipe.method == "ClippedLasso(a=inf)" and recipe.budget.limits == {"layer1": (0.5, 0.9)}
    checkpoint = load_checkpoint(tmp_path / "run" / "last.pt")
    assert checkpoint.info.recipe == recipe
    assert history_of(autogate.load(tmp_path / "run" / "slim.safetensors")).slimmings[0].method == recipe.method
