"""What the first steps of a run say about it: each warning here is of a run that would cost the model its accuracy.

Nothing is wrong with the gates in such a run, so nothing raises. But gates close all the same, towards the budget, and
what they close was chosen badly or can't be made up for.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from autogate.gating.sharding import local
from rewriters.recording import modules_of

FEW_STEPS = 50
"""A run of fewer steps is told of. The way down takes a third of a short run: a dozen batches would have to tell which
channels matter."""

BLIND_STEPS = 2
"""Steps without a gradient in any gated kernel before that is told. Creating an optimizer's state may take one."""


@torch.no_grad()
def looks_untrained(model: nn.Module) -> bool:
    """Whether all norms of a model are as they were initialised: weights and statistics 0 or 1 everywhere.

    False for a model without norms, about which nothing can be said.
    """
    tensors = [
        tensor
        for module in modules_of(model)
        for name, tensor in _norm_tensors(module)
        if name != "num_batches_tracked"
    ]
    return bool(tensors) and all(_is_initial(tensor) for tensor in tensors)


def _norm_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Own tensors of a norm. Norms of other libraries are known by their names, as `RMSNorm` and `LayerNorm2d`."""
    if "norm" in type(module).__name__.lower():
        yield from module.named_parameters(recurse=False)
        yield from module.named_buffers(recurse=False)


def _is_initial(tensor: Tensor) -> bool:
    if tensor.is_meta or tensor.numel() == 0:
        return True
    least, most = map(float, tensor.aminmax())
    return least == most and least in (0.0, 1.0)


class FirstSteps:
    """Watches the first steps of a bank's run, and warns.

    Args:
        untrained: the model looked untrained when it was prepared.
    """

    def __init__(self, untrained: bool):
        self.untrained = untrained
        self._told_of_start = False
        self._held: set[int] = set()
        self._told_of_optimizers = False
        self._blind = 0
        self._seen_gradient = False

    @property
    def over(self) -> bool:
        """Whether nothing is watched any more, so that later steps cost nothing."""
        return self._told_of_optimizers and self._told_of_start and not self.waits_for_gradients

    @property
    def waits_for_gradients(self) -> bool:
        """Whether no gated kernel has had a gradient yet, and that was not told."""
        return not self._seen_gradient and self._blind < BLIND_STEPS

    def starts(self, steps: int, taken: int) -> None:
        """Called before each step: whether the run is long enough, and the model worth it.

        Args:
            steps: of the whole run.
            taken: steps that were taken before, by a run that is resumed.
        """
        if self._told_of_start:
            return
        self._told_of_start = True
        if not taken and self.untrained:
            warn(
                "the model looks untrained: all its norms are as they were initialised, and in such a model nothing "
                "tells useful channels from useless ones yet. Train it, or load its weights, before autogate.prepare."
            )
        if not taken and steps < FEW_STEPS:
            warn(
                f"the run has {steps} steps, too few to learn which channels matter. `steps` of autogate.prepare "
                "counts optimizer steps, not epochs: epochs * batches per epoch."
            )

    def steps(
        self, optimizer: Optimizer, kernels: Mapping[str, nn.Parameter], added: Iterable[tuple[str, nn.Parameter]]
    ) -> None:
        """Called before each step of an optimizer that trains the model: what no optimizer trains.

        This is known once every optimizer has had its turn: at the second step of one of them.

        Args:
            optimizer: about to step.
            kernels: the gated kernels, by name.
            added: names and weights of layers that prepare has added and that learn.
        """
        if self._told_of_optimizers:
            return
        held = {id(weight) for group in optimizer.param_groups for weight in group["params"] if weight.requires_grad}
        if not held <= self._held:
            self._held |= held
            return
        self._told_of_optimizers = True
        missing = [name for name, weight in added if id(weight) not in self._held]
        if missing:
            warn(
                f"no optimizer trains {some(missing)}: prepare has added these layers on shortcuts. Build the "
                "optimizer after autogate.prepare."
            )
        frozen = [name for name, weight in kernels.items() if id(weight) not in self._held]
        share = _count(kernels[name] for name in frozen) / max(1, _count(kernels.values()))
        if frozen:
            warn(
                f"no optimizer trains {share:.0%} of the gated weights ({some(frozen)}). Their gates close all the "
                "same, and what is left of these layers can't make up for it. Train them too, or keep their channels: "
                "autogate.prepare(..., ignore=[...])."
            )

    def stepped(self, kernels: Iterable[nn.Parameter]) -> None:
        """Called after each step while it waits for gradients: whether any gated kernel has had one."""
        gradients = (weight.grad for weight in kernels)
        if any(gradient is not None and bool(local(gradient).any()) for gradient in gradients):
            self._seen_gradient = True
            return
        self._blind += 1
        if self._blind == BLIND_STEPS:
            warn(
                "no gated kernel has had a gradient in the first steps: gates close by what channels cost alone. Is "
                "the loss computed with the prepared model, and do its layers require gradients?",
                after=True,
            )


def warn(message: str, after: bool = False) -> None:
    """Warn of the line that calls `optimizer.step()`, from a function that the bank calls before or after the step."""
    warnings.warn(message, stacklevel=9 if after else 8)  # after it, `torch.no_grad()` is one call more


def some(names: list[str]) -> str:
    """The first three names."""
    return f"{', '.join(names[:3])}{' and others' if names[3:] else ''}"


def _count(weights: Iterable[Tensor]) -> int:
    return sum(weight.numel() for weight in weights)
