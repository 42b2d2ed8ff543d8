"""Exported slim models give the slim model's outputs."""

from functools import partial
from pathlib import Path

import onnxruntime
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import autogate
from autogate.cli import app
from autogate.files import exporting
from autogate.files.exporting import inputs_of, to_torch_export
from rewriters import VerificationError
from tests.rewriters.helpers import conv, image


def invoke(*words: object):
    return CliRunner().invoke(app, ["export", *map(str, words)])


def test_torch_export_for_batches_of_any_size(slim: Path, tmp_path: Path):
    told = invoke(slim, "--torch-export", tmp_path / "slim.pt2")
    assert told.exit_code == 0, told.output
    assert "outputs equal to" in told.output
    program, batch = torch.export.load(tmp_path / "slim.pt2").module(), torch.rand(5, 3, 64, 64)
    assert torch.allclose(program(batch), autogate.load(slim)(batch), atol=1e-5)


@pytest.mark.slow
def test_onnx_for_batches_of_any_size(slim: Path, tmp_path: Path):
    told = invoke(slim, "--onnx", tmp_path / "slim.onnx")
    assert told.exit_code == 0, told.output
    session, batch = onnxruntime.InferenceSession(str(tmp_path / "slim.onnx")), torch.rand(5, 3, 64, 64)
    (got,) = session.run(None, {session.get_inputs()[0].name: batch.numpy()})
    assert torch.allclose(torch.from_numpy(got), autogate.load(slim)(batch), atol=1e-4)


class Halves(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.fc = conv(3, 32, 3), nn.Linear(32, 4)

    def forward(self, x: torch.Tensor, *, scale: float, more: torch.Tensor) -> torch.Tensor:
        one, two = (self.stem(x) * scale + more).relu().chunk(2, 1)
        return self.fc(torch.cat([one.square(), two], 1).mean((2, 3)))


def test_rewritten_forwards_and_inputs_by_keyword(tmp_path: Path):
    model = autogate.prepare(Halves(), {"x": image(), "scale": 0.5, "more": torch.ones(2, 1, 1, 1)}, flops=1.0)
    with torch.no_grad():
        autogate.gates(model).alpha[::3] = 0
    slim = autogate.finalize(model, warn=False)
    assert "forward" in vars(slim) and slim.training
    assert to_torch_export(slim, tmp_path / "slim.pt2") < 1e-6
    assert slim.training
    (_, kwargs) = inputs_of(slim, 7)
    assert kwargs["x"].shape == (7, 3, 4, 4) and kwargs["more"].shape == (7, 1, 1, 1)


def test_other_outputs_are_an_error(slim: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model, other = autogate.load(slim), autogate.load(slim)
    with torch.no_grad():
        other.fc.bias.add_(1)
    program = exporting._program(other, inputs_of(other, 2))
    monkeypatch.setattr(exporting, "_program", lambda *args: program)
    with pytest.raises(VerificationError, match="outputs differ from the model's"):
        to_torch_export(model, tmp_path / "slim.pt2")


def test_what_is_wrong_is_told_without_a_traceback(slim: Path, tmp_path: Path):
    for words, code, told in (
        (["no.safetensors", "--onnx", "x"], 2, "there is no file"),
        ([slim], 2, "give --onnx"),
        ([__file__, "--onnx", "x"], 1, "not a safetensors file"),
        ([slim, "--torch-export", tmp_path / "no" / "x.pt2"], 1, "could not be written"),
    ):
        result = invoke(*words)
        assert result.exit_code == code, result.output
        assert told in " ".join(result.output.replace("│", " ").split())
        assert "Traceback" not in result.output


def test_onnx_that_is_not_installed_is_asked_for(slim: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(exporting.importlib.util, "find_spec", lambda name: None)
    result = invoke(slim, "--onnx", "x.onnx")
    assert result.exit_code == 1 and "pip install 'autogate[onnx]'" in " ".join(result.output.split())


def test_what_is_exported_is_compared_in_full_precision(slim: Path, tmp_path: Path, monkeypatch):
    """As the slim model is: on a GPU one of the two would be rounded otherwise."""
    model, told = autogate.load(slim), []
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)

    def run(args, kwargs):
        told.append(torch.backends.cudnn.allow_tf32)
        return model.eval()(*args, **kwargs)

    assert exporting._compare(model, partial(inputs_of, model), tmp_path, run) == 0
    assert told == [False, False] and torch.backends.cudnn.allow_tf32


def test_export_is_public(slim: Path, tmp_path: Path):
    assert autogate.to_torch_export(autogate.load(slim), str(tmp_path / "slim.pt2")) <= 1e-4
    assert torch.export.load(tmp_path / "slim.pt2").module()(torch.randn(3, 3, 64, 64)).shape == (3, 10)
