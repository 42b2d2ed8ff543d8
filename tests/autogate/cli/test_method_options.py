"""Options for methods and limits: what they ask for ends in the run's recipe."""

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
