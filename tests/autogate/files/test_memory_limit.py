"""A file that asks for more memory than a slim model of its size needs is refused before memory is taken."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import autogate
from autogate import AutogateError
from autogate.files import TimmBuild, build_with_timm, dense_model, memory_limit, timm_builds
from tests.autogate.files.slim_nets import build, example, outputs, slim_small, slimmed, small
from tests.autogate.files.test_untrusted_files import with_header


@pytest.fixture
def only_meta(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models can be built on the meta device only."""
    create = timm.create_model

    def guarded(*args: Any, **kwargs: Any) -> nn.Module:
        assert torch.empty(0).is_meta, "memory was taken"
        return create(*args, **kwargs)

    monkeypatch.setattr(timm, "create_model", guarded)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("files") / "slim.safetensors"
    autogate.save(slimmed(build("test_resnet", num_classes=10), example()), path)
    return path


def altered(path: Path, file: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    with_header(path, file.read_bytes(), change)
    return path


@pytest.mark.parametrize("read", [autogate.load, dense_model])
def test_another_model_is_refused_before_it_is_built(
    read: Callable[[Path], nn.Module], only_meta: None, file: Path, tmp_path: Path
):
    def name_a_huge_one(header: dict[str, Any]) -> None:
        header["build"] = {"name": "eva02_enormous_patch14_clip_224", "arguments": {}}

    path = altered(tmp_path / "slim", file, name_a_huge_one)
    with pytest.raises(AutogateError, match=r"it is .* in this model, and .* in the model that was slimmed"):
        read(path)


def test_a_huge_model_is_refused_though_its_shapes_are_those_of_the_record(only_meta: None, file: Path, tmp_path: Path):
    how = TimmBuild("vit_giant_patch14_224", {})
    outline = timm_builds.outline_with_timm(how)

    def name_it(header: dict[str, Any]) -> None:
        header["build"] = {"name": how.name, "arguments": {}}
        header["slimmings"][0]["tensors"] = {
            name: {"shape": list(tensor.shape), "dtype": "float32"} for name, tensor in outline.state_dict().items()
        }

    path = altered(tmp_path / "slim", file, name_it)
    with pytest.raises(AutogateError, match=r"the dense model would take 3\..* GiB, more than the .*max_bytes=\d+"):
        autogate.load(path)


@pytest.mark.parametrize("shape", [[300_000, 3, 64, 64], [2**40, 2**40]])
def test_huge_inputs_are_refused(shape: list[int], file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    zeros = torch.zeros

    def small_zeros(shape: Any, **options: Any) -> Tensor:
        assert shape == [] or torch.empty(shape, device="meta").numel() < 1e6, "memory was taken"
        return zeros(shape, **options)

    def ask(header: dict[str, Any]) -> None:
        header["slimmings"][0]["inputs"] = [{"tuple": [{"tensor": shape, "dtype": "float32"}]}, {"dict": {}}]

    path = altered(tmp_path / "slim", file, ask)
    monkeypatch.setattr("autogate.slim.history.torch.zeros", small_zeros)
    with pytest.raises(AutogateError, match=r"the example inputs would take .* GiB, more than.*max_bytes="):
        autogate.load(path)
    monkeypatch.undo()
    assert isinstance(autogate.load(path, example_inputs=example()), nn.Module)


def test_the_limit_can_be_set(file: Path, tmp_path: Path):
    dense = build_with_timm(TimmBuild("test_resnet", {"num_classes": 10}))
    size = sum(tensor.nbytes for tensor in dense.state_dict().values())
    with pytest.raises(AutogateError, match=f"max_bytes={size}"):
        autogate.load(file, max_bytes=size - 1)
    with pytest.raises(AutogateError, match=f"max_bytes={size}"):
        dense_model(file, max_bytes=size - 1)
    autogate.load(file, max_bytes=size)
    autogate.save(slim_small(), tmp_path / "own")
    autogate.load(tmp_path / "own", small(), max_bytes=10**5)  # it is built already, so only inputs count
    with pytest.raises(AutogateError, match="the example inputs would take"):
        autogate.load(tmp_path / "own", small(), max_bytes=10)


def test_the_default_grows_with_the_file():
    assert memory_limit.default_limit(10) == 2**30
    assert memory_limit.default_limit(10**9) == 10**11


def test_a_constructor_that_asks_for_a_value_is_built_for_real(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """As the constructors of models that the user has registered may."""
    create, real = timm.create_model, []

    def asking(*args: Any, **kwargs: Any) -> nn.Module:
        real.append(torch.linspace(0, 1, 2)[1].item())
        return create(*args, **kwargs)

    slim = slimmed(build("test_resnet", num_classes=10), example()).eval()
    monkeypatch.setattr(timm, "create_model", asking)
    autogate.save(slim, tmp_path / "slim")
    assert torch.equal(outputs(autogate.load(tmp_path / "slim"), example())[0], outputs(slim, example())[0])
    assert real
