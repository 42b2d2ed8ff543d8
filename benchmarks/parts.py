"""Shared parts of the benchmarks: models unlike their initialisation, random dead classes, files of results."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import flop_registry

import autogate
import rewriters
from autogate.inputs import Inputs
from rewriters.recording.capture import capture
from rewriters.recording.side_effects import set_modes


@torch.no_grad()
def randomise_norms(model: nn.Module, seed: int = 0) -> None:
    """Give batch norms statistics and affine parameters that no initialisation leaves."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            shape = module.running_mean.shape
            module.running_mean.copy_(torch.randn(shape, generator=generator) * 0.1)
            module.running_var.copy_(torch.rand(shape, generator=generator) + 0.5)
            if module.affine:
                module.weight.copy_(torch.rand(shape, generator=generator) + 0.5)
                module.bias.copy_(torch.randn(shape, generator=generator) * 0.1)


@torch.no_grad()
def randomise_vectors(model: nn.Module) -> None:
    """Draw the weights, biases and scales that are vectors, of everything but batch norms."""
    for module in model.modules():
        if not isinstance(module, nn.modules.batchnorm._BatchNorm):
            for key, vector in module.named_parameters(recurse=False):
                if vector.ndim == 1 and key == "weight":
                    vector.uniform_(0.5, 1.5)
                elif vector.ndim == 1 and key == "bias":
                    vector.normal_(std=0.1)
                elif vector.ndim == 1 and key == "gamma":
                    vector.uniform_(0.2, 0.7)


TINY = 2e-3
"""Standard deviation of a kernel that is practically zero."""


@torch.no_grad()
def randomise_constants(model: nn.Module, seed: int = 0) -> None:
    """Add noise to parameters that start as one number everywhere (scales of branches) or near zero (classifiers)."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if not parameter.is_floating_point() or not parameter.numel():
            continue
        if bool((parameter == parameter.flatten()[0]).all()) or (parameter.ndim > 1 and parameter.std() < TINY):
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)


NOISE = 1e-5
MOST_GROWTH = 1e3
"""Limit on how much a small change of the inputs may grow on its way to the outputs, in relative terms."""

RAISES = 24
"""Limit on how often variances are raised."""


@torch.no_grad()
def settle_norms(model: nn.Module, inputs: Inputs) -> None:
    """Set the running statistics of batch norms to those of these inputs, then change them a little.

    Statistics that don't fit shrink the signal layer by layer, until only biases reach the outputs, and comparing
    outputs can't tell a wrong network from a right one. On the other hand, deep random networks are chaotic: they
    amplify rounding errors layer by layer. So no variance is below the mean of all variances, as that of a nearly
    constant channel would be, and all are raised until the network is calm (`MOST_GROWTH`).
    """
    norms = [
        module for module in model.modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None
    ]  # fmt: skip
    modes, momenta = set_modes(model, False), [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
        norm.train()
    model(*inputs[0], **inputs[1])
    set_modes(model, modes)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.running_mean.add_(torch.randn_like(norm.running_mean) * 0.1 * norm.running_var.sqrt())
        norm.running_var.clamp_(min=float(norm.running_var.mean()))
        norm.running_var.mul_(torch.rand_like(norm.running_var) + 0.5)
    for _ in range(RAISES):
        if not norms or growth(model, inputs) <= MOST_GROWTH:
            break
        for norm in norms:
            norm.running_var.mul_(1.2)


def growth(model: nn.Module, inputs: Inputs) -> float:
    """How much relative noise of `NOISE` on the inputs grows in the worst output."""

    def noisy(tensor: Tensor) -> Tensor:
        return tensor * (1 + NOISE * torch.randn_like(tensor)) if tensor.is_floating_point() else tensor

    changed = rewriters.run_eval(model, *tree_map_only(Tensor, noisy, inputs))
    return rewriters.relative_error(changed, rewriters.run_eval(model, *inputs)) / NOISE


def spread(outputs: Iterable[Tensor]) -> float:
    """Relative distance between the outputs of the first two samples of a batch, for the output where it is smallest.

    If it is zero, comparing outputs says nothing. An output whose batch isn't its first dimension may be left out.
    """
    compared = [out for out in outputs if out.is_floating_point() and len(out) > 1]
    apart = [(out[0] - out[1]).abs().max() / out.abs().max() for out in compared]
    return float(min(apart))


@torch.no_grad()
def kill(model: nn.Module, share: float, seed: int = 0) -> None:
    """Set a random `share` of a prepared model's gates to zero."""
    alpha = autogate.gates(model).alpha
    dead = torch.rand(len(alpha), generator=torch.Generator().manual_seed(seed)) < share
    alpha[dead.to(alpha.device)] = 0


LEAST_SPREAD = 1e-3
"""If the outputs of two samples are closer than this, they say too little about the network to be compared."""


def finalize_compared(model: nn.Module, inputs: Inputs, *others: Inputs) -> float:
    """Settle a prepared model's norms and finalize it. Returns the largest relative difference of its outputs.

    Args:
        model: a prepared model.
        inputs: inputs to settle the norms on.
        others: more inputs to compare outputs on, for instance batches of another size.

    Raises:
        ValueError: the gated outputs hardly depend on the inputs; a wrong network would have the same ones.
    """
    settle_norms(model, inputs)
    gated = rewriters.run_eval(model, *inputs)
    if not spread(gated) > LEAST_SPREAD:
        raise ValueError(f"outputs of two samples differ by {spread(gated):.0e} of their size: nothing to compare")
    wanted = [gated, *(rewriters.run_eval(model, *other) for other in others)]
    slim = autogate.finalize(model, warn=False)
    got = [rewriters.run_eval(slim, *each) for each in (inputs, *others)]
    return max(map(rewriters.relative_error, got, wanted))


def share_left(model: nn.Module) -> float:
    """The share of FLOPs left with half of a prepared model's classes dead: the mean over three draws."""
    left = []
    for seed in range(3):
        twin = copy.deepcopy(model)
        kill(twin, 0.5, seed)
        summary = autogate.summary(twin)
        left.append(summary.flops / summary.all_flops)
    return sum(left) / len(left)


def worst_difference(model: nn.Module, inputs: Inputs, draws: Iterable[tuple[float, int]]) -> float:
    """The largest result of `finalize_compared` on copies of a prepared model, over (share of dead classes, seed)."""
    differences = []
    for share, seed in draws:
        twin = copy.deepcopy(model)
        kill(twin, share, seed)
        differences.append(finalize_compared(twin, inputs))
    return max(differences)


PRODUCTS_WITH_KERNELS = (torch.ops.aten.convolution, torch.ops.aten.mm, torch.ops.aten.addmm)
"""Convolutions, and products with two-dimensional kernels such as those of linear layers."""


def recorded_flops(model: nn.Module, inputs: Inputs, of: Collection[Any] | None = None) -> float:
    """Multiply-adds of the ops in `of` for one sample in eval mode, by torch's own formulas."""
    modes = set_modes(model, False)
    try:
        graph = capture(model, *inputs).graph
    finally:
        set_modes(model, modes)
    total = 0
    for node in graph.nodes:
        op = getattr(node.target, "overloadpacket", None)
        if op in flop_registry and (of is None or op in of):
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda other: other.meta["val"])
            total += flop_registry[op](*args, **kwargs, out_val=node.meta["val"])
    return total / 2 / rewriters.samples_in(*inputs)


def lines(out: Path) -> list[dict[str, Any]]:
    """The results in a file of JSON lines; none if there is no file."""
    return [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []


def append(out: Path, result: dict[str, Any]) -> None:
    """Add a result to a file of JSON lines."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("a") as file:
        file.write(json.dumps(result) + "\n")


def measure_missing(out: Path, models: Iterable[str], measure: Callable[[str], dict[str, Any]]) -> None:
    """Append a line of JSON for each model that has none in `out` yet."""
    done = {line["model"] for line in lines(out)}
    for name in models:
        if name not in done:
            result = {"model": name, **measure(name)}
            append(out, result)
            print(result, flush=True)
