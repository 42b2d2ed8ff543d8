"""Models are prepared from several threads, beside threads that run others, and in inference mode."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import timm
import torch
from torch import Tensor, nn

import autogate

EXAMPLE = torch.randn(2, 3, 32, 32)


def built(name: str) -> nn.Module:
    return timm.create_model(name, num_classes=4, **({"img_size": 32} if "vit" in name else {})).eval()


def prepared(name: str) -> int:
    model = autogate.prepare(built(name), EXAMPLE)
    return autogate.gates(model).channel_map.checksum()


@pytest.mark.slow
def test_several_threads_prepare_several_models():
    names = ["test_vit", "test_resnet", "test_vit", "test_convnext"]
    alone = [prepared(name) for name in names]
    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(prepared, names)) == alone


class Asking(nn.Module):
    """Has another thread run another model, once it holds a size itself and is traced."""

    def __init__(self, other: nn.Module) -> None:
        super().__init__()
        self.ask = lambda: got_in_a_thread(other)

    def forward(self, y: Tensor) -> Tensor:
        y = y.reshape(len(y), 8, -1).view(y.shape)
        self.ask()
        return y


GOT: list[Tensor] = []


def got_in_a_thread(model: nn.Module) -> None:
    with ThreadPoolExecutor(1) as thread:
        GOT.append(thread.submit(model, EXAMPLE).result())


def test_another_thread_runs_a_model_meanwhile():
    other = timm.create_model("test_vit", img_size=32).eval().requires_grad_(False)
    model = nn.Sequential(nn.Conv2d(3, 8, 1), Asking(other), nn.Conv2d(8, 2, 1))
    GOT.clear()
    model = autogate.prepare(model, EXAMPLE)
    assert autogate.gates(model).channel_map.size == 8
    assert len(GOT) > 1 and all(torch.equal(one, other(EXAMPLE)) for one in GOT)


@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
def test_inference_mode_leaves_no_trace(name):
    model = built(name)
    with torch.inference_mode():
        model = autogate.prepare(model, EXAMPLE)
    with torch.no_grad():
        autogate.gates(model).alpha[::2] = 0
        wanted = model(EXAMPLE)
    with torch.inference_mode():
        slim = autogate.finalize(model, EXAMPLE, warn=False)
    slim(EXAMPLE).sum().backward()
    assert not any(parameter.is_inference() for parameter in slim.parameters())
    torch.testing.assert_close(slim(EXAMPLE), wanted, rtol=1e-5, atol=1e-5)


def shortcut_net() -> nn.Module:
    return timm.create_model("test_resnet", num_classes=4)


def finalized_early() -> None:
    autogate.finalize(autogate.prepare(shortcut_net(), EXAMPLE))


def without_shortcuts() -> None:
    autogate.prepare(nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 2, 1)), EXAMPLE, shortcuts="conv")


def trained_without_what_was_added() -> None:
    model = shortcut_net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model = autogate.prepare(model, EXAMPLE, shortcuts="conv")
    for _ in range(2):
        model(EXAMPLE).sum().backward()
        optimizer.step()


@pytest.mark.parametrize("call", [finalized_early, without_shortcuts, trained_without_what_was_added])
def test_warnings_name_the_line_that_called(call):
    with pytest.warns(UserWarning) as told:
        call()
    assert {warning.filename for warning in told} == {__file__}
