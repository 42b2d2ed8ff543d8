"""The demo on real images: train, train with gates, finalize."""

import pytest
import torch
from typer.testing import CliRunner

import autogate
from autogate import demo, digits
from autogate.cli import app


@pytest.fixture(scope="module")
def outcome():
    return demo.run(flops=0.5, dense_epochs=3, gated_epochs=8)


@pytest.mark.slow
def test_the_budget_is_met_within_a_point(outcome):
    assert abs(outcome.slim.flops / outcome.dense.flops - 0.5) <= 0.01


@pytest.mark.slow
def test_the_slim_network_tells_every_image_as_the_gated_one_did(outcome):
    assert outcome.differing == 0
    assert outcome.error <= 1e-5
    assert outcome.gated_accuracy == outcome.slim.accuracy


@pytest.mark.slow
def test_half_the_network_still_reads_digits(outcome):
    assert outcome.dense.accuracy >= 95
    assert outcome.slim.accuracy >= outcome.dense.accuracy - 2


@pytest.mark.slow
def test_the_slim_network_is_smaller_than_the_dense_one(outcome):
    assert outcome.slim.params < outcome.dense.params
    assert outcome.slim.params == sum(p.numel() for p in outcome.model.parameters())


@pytest.mark.slow
def test_gates_are_polarized_at_the_end_of_training():
    torch.manual_seed(0)
    train, _ = digits.load()
    model = demo.timm.create_model(demo.MODEL, num_classes=10, in_chans=1)
    demo.fit(model, train, 2, 0.05)
    model = autogate.prepare(model, train.images[:2], flops=0.6, steps=demo.steps_in(6, train))
    demo.fit(model, train, 6, 0.05)
    gates = autogate.gates(model).gates()
    assert (gates == 0).any()
    assert not ((gates > 0.01) & (gates < 0.5)).any()


def test_demo_command_prints_the_table_and_saves_the_model(tmp_path):
    path = tmp_path / "slim.safetensors"
    result = CliRunner().invoke(
        app, ["demo", "--dense-epochs", "1", "--gated-epochs", "2", "--flops", "0.8", "--out", str(path)]
    )
    assert result.exit_code == 0, result.output
    for word in ("FLOPs", "parameters", "accuracy", "latency", "slim.safetensors"):
        assert word in result.output
    slim = autogate.load(path)
    assert slim(torch.randn(1, 1, digits.SIZE, digits.SIZE)).shape == (1, 10)


def test_demo_command_tells_a_bad_budget_without_a_traceback():
    result = CliRunner().invoke(app, ["demo", "--dense-epochs", "1", "--gated-epochs", "1", "--flops", "2"])
    assert result.exit_code == 1
    assert "flops" in result.output
    assert "Traceback" not in result.output
