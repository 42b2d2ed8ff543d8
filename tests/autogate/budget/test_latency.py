"""Latency as a resource: tables between measured widths, and timings kept on disk."""

import io
import json
from functools import partial

import pytest
import torch
from rich.console import Console
from torch import nn
from torch.utils import benchmark

import autogate
from autogate.budget import latency, timing
from autogate.budget.latency import Latency
from autogate.budget.products import Activations, Products
from autogate.budget.resource import SideCounts
from autogate.inputs import as_call
from rewriters import analyse
from rewriters.labelling.channel_map import Side
from tests.autogate.gated_nets import ConvNet, conv_net_map
from tests.autogate.loops.small_nets import EXAMPLE, Residual, batches


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache folder of the test's own, and timings that take no time."""
    monkeypatch.setenv("AUTOGATE_CACHE", str(tmp_path))
    monkeypatch.setattr(timing, "SECONDS", 1e-6)
    return tmp_path


def by_macs(monkeypatch) -> list[nn.Module]:
    """Lets layers take a second a multiply-add of their kernel, and the model as long as its layers and 1,000 more."""
    timed: list[nn.Module] = []

    def layer(self, module, widths, whole_groups, x):
        like = timing.narrowed(module, widths, whole_groups)
        timed.append(like)
        return float(like.weight.numel())

    monkeypatch.setattr(timing.Timings, "layer", layer)

    def model(model, layers, inputs):
        return sum(float(m.weight.numel()) for m in layers) + 1000, {m: [torch.zeros(1)] for m in layers}

    monkeypatch.setattr("autogate.budget.latency.time_model", model)
    return timed


def some_live(size: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(size, generator=torch.Generator().manual_seed(seed)) < 0.6


def table(seconds: torch.Tensor, widths: torch.Tensor, classes: list[list[int]], size: int) -> Latency:
    """A resource of one layer, whose dimensions hold the given classes, and nothing else."""
    sides = SideCounts(size, [0.0, 0.0], classes)
    return Latency(sides, widths, seconds, 0.0, Products(sides, []), torch.ones(1).bool())


def test_a_table_that_is_bilinear_gives_the_bilinear_resource(monkeypatch):
    """Timings proportional to kernels' sizes, interpolated, are those sizes at every width."""
    by_macs(monkeypatch)
    channel_map = conv_net_map(residual=True)
    net = ConvNet(residual=True)
    latency = Latency.measure(channel_map, net, as_call(torch.zeros(2, 3, 6, 6), net))
    activations = Activations(channel_map, net)
    kernels = {kernel.weight: net.get_parameter(kernel.weight) for kernel in channel_map.kernels}
    for seed in range(5):
        live = some_live(channel_map.size, seed)
        expected = 1000 * activations.share(live)
        for name, weight in kernels.items():
            sizes = [len(channel_map.kept(Side(name, dim), live)) if Side(name, dim) in channel_map.classes
                     else weight.shape[dim] for dim in (0, 1)]  # fmt: skip
            expected += sizes[0] * sizes[1] * weight[0, 0].numel()
        assert latency.value(live).item() == pytest.approx(expected)


def test_price_is_the_slope_towards_fewer_channels(monkeypatch):
    by_macs(monkeypatch)
    channel_map, net = conv_net_map(), ConvNet()
    latency = Latency.measure(channel_map, net, as_call(torch.zeros(2, 3, 6, 6), net))
    for live in (torch.ones(channel_map.size, dtype=torch.bool), some_live(channel_map.size)):
        price = latency.price(live)
        for label in torch.nonzero(live).flatten().tolist()[::5]:
            without = live.clone()
            without[label] = False
            # No class lies on both sides of one kernel here: one death is exactly its slope.
            assert price[label].item() == pytest.approx((latency.value(live) - latency.value(without)).item())


def test_between_widths_time_is_interpolated_and_falls_to_zero_below_the_first():
    widths = torch.tensor([[[0.0, 1, 2, 4, 6, 8]] * 2], dtype=torch.float64)
    seconds = torch.tensor([[[0.0] * 6, *[[0.0, 8, 8, 8, 8, 8], *[[0.0, *[t] * 5] for t in (10.0, 20, 26, 30)]]]])
    latency = table(seconds.double(), widths, [list(range(8)), list(range(8, 16))], 16)
    live = torch.ones(16, dtype=torch.bool)
    for count, wanted in ((8, 30), (7, 28), (6, 26), (5, 23), (3, 15), (1, 8), (0, 0)):
        live[:8] = torch.arange(8) < count
        assert latency.value(live).item() == pytest.approx(wanted)


def test_a_narrower_layer_that_measured_slower_counts_as_the_wider_one():
    widths = torch.tensor([[[0.0, 1, 2, 4, 6, 8], [0.0] + [5.0] * 5]], dtype=torch.float64)
    times = [[0.0] * 6, *[[0.0, *[t] * 5] for t in (3.0, 9, 5, 7, 12)]]
    latency = table(torch.tensor([times]).double(), widths, [list(range(8)), [8] * 5], 9)
    live = torch.ones(9, dtype=torch.bool)
    values = []
    for count in range(8, -1, -1):
        live[:8] = torch.arange(8) < count
        values.append(latency.value(live).item())
        assert (latency.price(live) >= 0).all()
    assert values == sorted(values, reverse=True) and values[4] == 9


@pytest.mark.parametrize(
    ("layer", "widths", "whole_groups", "channels"),
    [
        (nn.Conv2d(8, 12, 3, padding=1), (5, 3), False, 3),
        (nn.Conv2d(8, 8, 3, groups=8), (3, 1), True, 3),
        (nn.Conv2d(16, 16, 3, groups=4), (8, 4), True, 8),
        (nn.Conv2d(16, 16, 1, groups=2, bias=False), (8, 5), False, 10),
        (nn.ConvTranspose2d(8, 6, 2, stride=2), (5, 4), False, 5),
        (nn.Linear(7, 9), (4, 2), False, 2),
    ],
)
def test_a_narrowed_layer_runs_and_the_layer_is_as_it_was(layer, widths, whole_groups, channels):
    text, weight = str(layer), layer.weight.detach().clone()
    like = timing.narrowed(layer, widths, whole_groups)
    x = torch.randn(2, channels) if isinstance(layer, nn.Linear) else torch.randn(2, channels, 9, 9)
    assert like.weight.shape[:2] == widths and like(x).isfinite().all()
    assert str(layer) == text and torch.equal(layer.weight, weight)


def test_a_call_is_warmed_up_and_its_median_counts(monkeypatch):
    """By a clock that the call itself puts forward: far at first, and by more than usual now and then."""
    spent: list[float] = []

    def call() -> None:
        spent.append(60.0 if not spent else 5.0 if len(spent) % 3 == 0 else 1.0)

    monkeypatch.setattr(benchmark, "Timer", partial(benchmark.Timer, timer=lambda: sum(spent)))
    monkeypatch.setattr(timing, "SECONDS", 20.0)
    assert timing.seconds(call) == 1
    assert sum(spent[1:]) >= 20 and 5 in spent


def test_timings_are_kept_on_disk_and_taken_once(cache):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.Flatten(), nn.Linear(16, 2))
    inputs = as_call(torch.randn(2, 3, 6, 6), net)
    channel_map = analyse(net, *inputs).channel_map
    first = Latency.measure(channel_map, net, inputs)
    (file,) = cache.iterdir()
    kept = json.loads(file.read_text())
    assert len(kept["seconds"]) == 5 + 5 * 4 + 5  # of 4 channels an eighth is 1, too
    assert min(kept["seconds"].values()) > 0
    kept["seconds"] = dict.fromkeys(kept["seconds"], 1.0)
    file.write_text(json.dumps(kept))
    again = Latency.measure(channel_map, net, inputs)
    assert again.whole == pytest.approx(3) and first.whole < 3  # a second for each layer, off the disk
    file.write_text("{ torn")
    assert Latency.measure(channel_map, net, inputs).whole < 3


def test_each_machine_has_a_file_that_names_it(cache, monkeypatch):
    layer = nn.Linear(4, 2)
    hosts = ("here", "there")
    for host in hosts:
        monkeypatch.setattr("platform.node", lambda host=host: host)
        with timing.Timings(timing.machine(layer)) as timings:
            timings.layer(layer, (2, 4), False, torch.randn(2, 4))
        assert timings.taken
    for host, file in zip(hosts, sorted(cache.iterdir()), strict=True):
        assert file.name.startswith(f"latency-{host}-") and file.suffix == ".json"
        named = json.loads(file.read_text())["machine"]
        assert (named["host"], named["torch"]) == (host, torch.__version__)


def test_training_ends_on_a_latency_target(monkeypatch):
    by_macs(monkeypatch)
    torch.manual_seed(0)
    model = autogate.prepare(Residual(), EXAMPLE, latency=0.6, steps=60)
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    for images, labels in batches(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
    progress = autogate.gates(model).progress()
    assert progress.settled and abs(progress.shares["latency"] - 0.6) <= 0.01


def test_measuring_leaves_the_model_as_it_was():
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3))
    net[1].eval()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    autogate.prepare(net, torch.randn(2, 3, 8, 8), latency=1.0, steps=100)
    assert [module.training for module in net[:4]] == [True, False, True, True]
    assert all(torch.equal(net.state_dict()[name], value) for name, value in before.items())
    assert not any(module._forward_pre_hooks for module in net[:4])
    assert autogate.gates(net).progress().targets == {"latency": 1.0}


def test_a_terminal_sees_what_is_timed(cache, monkeypatch, capfd):
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 2))
    inputs = as_call(torch.randn(2, 3, 6, 6), net)
    channel_map = analyse(net, *inputs).channel_map
    Latency.measure(channel_map, net, inputs)
    assert capfd.readouterr() == ("", "")
    seen = io.StringIO()
    terminal = Console(file=seen, force_terminal=True, width=120)
    monkeypatch.setattr(latency, "Console", lambda **_: terminal)
    Latency.measure(channel_map, net, inputs)
    for words in ("timing the whole model", "0/2", "timing 0 at several widths", "timing 3 at several widths", "1/2"):
        assert words in seen.getvalue()
