"""Measure the time of a model's forward and of its layers on this machine, once, and keep the timings on disk.

There is one JSON file for each machine, device and number of threads. It is in the folder that the environment variable
AUTOGATE_CACHE names, or else next to torch's own cache (TORCH_HOME). If you delete a file, its timings are taken again.
"""

from __future__ import annotations

import copy
import json
import logging
import os
import platform
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from autogate.inputs import Inputs
from rewriters import fields_after, samples_in
from rewriters.interrupts import let_signals_in

Layer = nn.modules.conv._ConvNd | nn.Linear

SECONDS = 0.02
"""Minimum time to repeat a call for, in seconds. The median of the repetitions counts."""


@torch.no_grad()
def seconds(call: Callable[[], Any]) -> float:
    """Median seconds of a call after a warm-up, including the work of a GPU."""
    call()
    return float(timer("call()", {"call": call}).blocked_autorange(min_run_time=SECONDS).median)


def timer(statement: str, names: Mapping[str, Any]) -> Any:
    """A `torch.utils.benchmark.Timer` of a statement with these globals, on as many threads as torch uses."""
    log = logging.getLogger("torch.utils.cpp_extension")
    level = log.level
    log.setLevel(logging.ERROR)  # the import looks for a compiler of CUDA, and warns where there is one and no GPU
    try:
        from torch.utils.benchmark import Timer  # not above: importing autogate would look for the compiler, too
    finally:
        log.setLevel(level)
    return Timer(statement, globals=dict(names), num_threads=torch.get_num_threads())


def time_model(model: nn.Module, layers: Sequence[Layer], inputs: Inputs) -> tuple[float, dict[Layer, list[Tensor]]]:
    """Time a model's forward over one sample in eval mode, and collect what its layers are called with.

    Args:
        model: the model; it is not changed.
        layers: modules that take one tensor.
        inputs: a batch of samples; the first one is used.

    Returns:
        Seconds, and for each layer the inputs of its calls.
    """
    samples = samples_in(*inputs)
    args, kwargs = tree_map_only(Tensor, lambda x: x[:1] if x.ndim and len(x) == samples else x, inputs)
    calls: dict[Layer, list[Tensor]] = {layer: [] for layer in layers}
    modes = {module: module.training for module in model.modules()}
    hooks = [layer.register_forward_pre_hook(lambda module, x: calls[module].append(x[0])) for layer in calls]
    model.eval()
    try:
        with torch.no_grad():
            model(*args, **kwargs)
        for hook in hooks:
            hook.remove()
        return seconds(lambda: model(*args, **kwargs)), calls
    finally:
        for hook in hooks:
            hook.remove()
        for module, training in modes.items():
            module.training = training


def narrowed(layer: Layer, widths: Sequence[int], whole_groups: bool) -> Layer:
    """A layer like `layer` whose kernel has other widths and random values.

    Args:
        layer: a convolution or linear layer; it is not changed.
        widths: the first two dimensions of the new kernel.
        whole_groups: whether a grouped convolution loses whole groups, not the same positions in every group.
    """
    weight = layer.weight
    shape = torch.Size((*widths, *weight.shape[2:]))
    fields = dict(fields_after(layer, "weight", weight.shape, shape, whole_groups))
    like = copy.copy(layer)
    like.__dict__.update(fields, _forward_hooks={}, _forward_pre_hooks={})
    outputs = int(fields.get("out_channels", fields.get("out_features", 0)))
    # The strides are kept, because a channels_last kernel runs other code.
    made = torch.randn_like(weight.detach()[tuple(slice(size) for size in shape)])
    bias = None if layer.bias is None else nn.Parameter(weight.detach().new_zeros(outputs))
    like._parameters = {"weight": nn.Parameter(made, requires_grad=False), "bias": bias}
    return like


def machine(model: nn.Module) -> dict[str, Any]:
    """What timings are valid for: the host, the model's device, the number of threads and the version of torch."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    threads = torch.get_num_threads() if device.type == "cpu" else 0
    return {"host": platform.node(), "device": name, "threads": threads, "torch": torch.__version__}


def cache_folder() -> Path:
    """The folder of the timings."""
    named = os.environ.get("AUTOGATE_CACHE")
    return Path(named) if named else Path(torch.hub.get_dir()).parent / "autogate"


class Timings:
    """Timings of layers, looked up by what was timed.

    They are read from a file on entering the context, and written back on leaving it.

    Args:
        on: the machine, see `machine`.

    Attributes:
        path: the file.
        taken: timings that were not in the file.
    """

    def __init__(self, on: Mapping[str, Any]):
        name = re.sub(r"[^A-Za-z0-9.]+", "-", " ".join(map(str, on.values())))
        self.path = cache_folder() / f"latency-{name}.json"
        self.taken: dict[str, float] = {}
        self._machine = dict(on)
        self._known: dict[str, float] = {}

    def __enter__(self) -> Timings:
        self._known = self._read()
        return self

    def __exit__(self, *_: Any) -> None:
        if not self.taken:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # Another process may have written in the meantime: its timings are kept.
        content = {"machine": self._machine, "seconds": {**self._read(), **self.taken}}
        with NamedTemporaryFile("w", dir=self.path.parent, suffix=".tmp", delete=False) as file:
            json.dump(content, file, indent=1, sort_keys=True)
        os.replace(file.name, self.path)

    def _read(self) -> dict[str, float]:
        try:
            return {str(key): float(value) for key, value in json.loads(self.path.read_text())["seconds"].items()}
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            return {}

    def layer(self, layer: Layer, widths: Sequence[int], whole_groups: bool, x: Tensor) -> float:
        """Seconds of a layer with a kernel of other widths, on an input like `x` with as many channels as it takes."""
        let_signals_in()
        like = narrowed(layer, widths, whole_groups)
        channels, dim = (
            (like.in_features, x.ndim - 1)
            if isinstance(like, nn.Linear)
            else (like.in_channels, x.ndim + 1 - like.weight.ndim)
        )
        key = f"{like} {like.weight.stride()} on {tuple(x.shape)} {x.stride()} of {x.dtype} at {dim}"
        for known in (self._known, self.taken):
            if key in known:
                return known[key]
        data = torch.randn_like(x.narrow(dim, 0, min(channels, x.shape[dim])))
        self.taken[key] = seconds(lambda: like(data))
        return self.taken[key]
