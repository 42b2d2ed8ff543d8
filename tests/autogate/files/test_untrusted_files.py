"""Damaged and hostile files are refused and run no code."""

import json
import pickle
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import autogate
from autogate import AutogateError
from autogate.files import file_format
from tests.autogate.files.slim_nets import build, example, outputs, slim_small, slimmed, small
from tests.rewriters.helpers import image


def forbidden(*args: Any, **kwargs: Any) -> Any:
    raise AssertionError("unpickled or downloaded")


@pytest.fixture
def no_pickle(monkeypatch: pytest.MonkeyPatch) -> None:
    for place, name in ((pickle, "loads"), (pickle, "load"), (pickle, "Unpickler"), (torch, "load")):
        monkeypatch.setattr(place, name, forbidden)
    monkeypatch.setattr("timm.models._builder.load_pretrained", forbidden)
    monkeypatch.setattr("timm.models._factory.load_checkpoint", forbidden)
    monkeypatch.setattr("timm.models._factory.load_model_config_from_hf", forbidden)
    monkeypatch.setattr("timm.models._factory.load_model_config_from_path", forbidden)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("files") / "slim.safetensors"
    autogate.save(slim_small(), path)
    return path.read_bytes()


def with_header(path: Path, data: bytes, change: Callable[[dict[str, Any]], None]) -> None:
    """Write a file whose header says something else, with the checksum that fits it: what an enemy would write."""
    path.write_bytes(data)
    with safe_open(path, framework="pt") as opened:
        header = json.loads(opened.metadata()["autogate"])
    change(header)
    text = json.dumps(header)
    metadata = {"format": "pt", "autogate": text, "autogate_checksum": file_format._digest(text.encode())}
    save_file(load_file(path), path, metadata=metadata)


def test_no_pickle_is_read_and_nothing_downloaded(no_pickle, tmp_path: Path):
    slim = slimmed(build(num_classes=10), example())
    autogate.save(slim, tmp_path / "slim.safetensors")
    autogate.load(tmp_path / "slim.safetensors")


@pytest.mark.parametrize("name", ["hf-hub:someone/model", "local-dir:/tmp", "../resnet18", "no_such_model"])
def test_only_timms_own_models_are_built(name: str, no_pickle, written: bytes, tmp_path: Path):
    def change(header: dict[str, Any]) -> None:
        header["build"] = {"name": name, "arguments": {}}

    with_header(tmp_path / "slim", written, change)
    with pytest.raises(AutogateError, match="no model with this name"):
        autogate.load(tmp_path / "slim")


@pytest.mark.parametrize("argument", ["pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path"])
def test_no_argument_makes_timm_read_other_files(argument: str, no_pickle, written: bytes, tmp_path: Path):
    def change(header: dict[str, Any]) -> None:
        header["build"] = {"name": "resnet18", "arguments": {argument: "evil.pt"}}

    with_header(tmp_path / "slim", written, change)
    with pytest.raises(AutogateError, match=f"the argument '{argument}' is not allowed"):
        autogate.load(tmp_path / "slim")


CHANGES: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "format": (lambda header: header.update(format=2), "format"),
    "type": (lambda header: header["slimmings"][0].update(ignored=3), r"slimmings\.0\.ignored"),
    "missing": (lambda header: header["slimmings"][0].pop("kept"), r"slimmings\.0\.kept"),
    "kept": (lambda header: header["slimmings"][0]["kept"][0]["kept"].pop(), "in the model slimmed as the file says"),
    "out of range": (lambda header: header["slimmings"][0]["kept"][0].update(kept=[99]), "set of indices kept of"),
    "side": (lambda header: header["slimmings"][0]["kept"][0]["sides"].append(["x", 0]), r"kept of x\[0\]"),
    "dtype": (lambda header: header["slimmings"][0]["tensors"]["0.weight"].update(dtype="load"), "no dtype 'load'"),
    "inputs": (
        lambda header: header["slimmings"][0].update(inputs=[{"tuple": [{"eval": "1"}]}, {}]),
        "not a description of",
    ),
    "odd inputs": (
        lambda header: header["slimmings"][0].update(inputs=[{"tuple": [1]}, {"dict": {}}]),
        "fails on the example",
    ),
    "shortcuts": (lambda header: header["slimmings"][0].update(convolutions=["0"]), "set of convolutions on shortcuts"),
    "branches": (lambda header: header["slimmings"][0].update(branches={"0": [True]}), "the set of removed branches"),
    "no slimming": (lambda header: header.update(slimmings=[]), "lists no slimming"),
    "alias": (lambda header: header["aliases"].update({"0.bias": "0.weight"}), "0.bias shares the tensor"),
    "a parameter as a buffer": (
        lambda header: header["buffers"].update({"3.weight": "int64"}),
        "3.weight: the file's header lists it among the buffers",
    ),
    "a parameter as a buffer of the dense model": (
        lambda header: header["slimmings"][0]["buffers"].update({"3.weight": "int64"}),
        "3.weight: the record lists it twice",
    ),
    "no tensor": (lambda header: header["tensors"].pop("0.weight"), "tensor 0.weight is only in its tensors"),
    "checksum": (
        lambda header: header["tensors"].update({"3.bias": ""}),
        "tensor 3.bias is not the one that was saved",
    ),
}


@pytest.mark.parametrize("case", CHANGES)
def test_a_header_that_says_what_cannot_be(case: str, no_pickle, written: bytes, tmp_path: Path):
    change, part = CHANGES[case]
    with_header(tmp_path / "slim", written, change)
    dense = small()
    attributes = [dict(vars(module)) for module in dense.modules()]
    with pytest.raises(AutogateError, match=part):
        autogate.load(tmp_path / "slim", dense)
    assert [dict(vars(module)) for module in dense.modules()] == attributes


def test_files_of_other_kinds(no_pickle, tmp_path: Path):
    path = tmp_path / "slim.safetensors"
    with pytest.raises(FileNotFoundError):
        autogate.load(path)
    for data in (b"", b"x", pickle.dumps(forbidden), b"PK\3\4" + bytes(1000), random.Random(0).randbytes(5000)):
        path.write_bytes(data)
        with pytest.raises(AutogateError, match="truncated, or not a safetensors file"):
            autogate.load(path)
    save_file({"weight": torch.zeros(3)}, path)
    with pytest.raises(AutogateError, match="did not write it"):
        autogate.load(path)


def test_a_truncated_file(written: bytes, tmp_path: Path):
    for length in (7, 100, len(written) // 2, len(written) - 1):
        (tmp_path / "slim").write_bytes(written[:length])
        with pytest.raises(AutogateError, match="truncated"):
            autogate.load(tmp_path / "slim", small())


def test_no_altered_byte_goes_unnoticed(written: bytes, tmp_path: Path):
    (wanted,) = outputs(slim_small(), image())
    draw = random.Random(0)
    noticed = 0
    for _ in range(300):
        altered = bytearray(written)
        place = draw.randrange(len(altered))
        altered[place] ^= 1 << draw.randrange(8)
        (tmp_path / "slim").write_bytes(altered)
        try:
            loaded = autogate.load(tmp_path / "slim", small())
        except AutogateError as error:
            noticed += 1
            assert str(error)
        else:
            assert torch.equal(outputs(loaded, image())[0], wanted)
    assert noticed > 290
