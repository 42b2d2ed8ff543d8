"""Which channels are zero where they are off, and which become something else on the way to those who read them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from autogate.inputs import Inputs
from autogate.saliency.counting import Notes
from autogate.saliency.layout import layout_of
from rewriters import run_eval
from rewriters.recording import named_tensors


def nonzero_when_off(
    model: nn.Module, notes: Notes, call: Inputs, reads: Mapping[str, Tensor], makes: Mapping[int, Tensor], size: int
) -> Tensor:
    """The classes that layers read as something else than zero though all that choose them have them off.

    The model runs with every second of them on, and with every second pair: what mixes channels, as a mean across them
    does, makes nothing of zeros alone.

    Args:
        model: with saliency modules, whose scores are positive.
        notes: of the modules.
        call: inputs.
        reads: by the path of each layer that is looked at, the class of each channel that it reads.
        makes: by the number of each layer that chooses, the class of each channel that it makes.
        size: number of classes.

    Returns:
        Bool, shape (size + 1,): the last entry is that of `ALWAYS`.
    """
    found = torch.zeros(size + 1, dtype=torch.bool)
    device, number = next(model.parameters()).device, torch.arange(size + 1)
    for on in (number % 2 == 0, number % 2 == 1, number % 4 < 2, number % 4 >= 2):
        on[-1] = True
        handles = [
            model.get_submodule(path).register_forward_pre_hook(_Looking(classes, on, found))
            for path, classes in reads.items()
        ]
        notes.allowed = {layer: on[classes].to(device) for layer, classes in makes.items()}
        notes.begin()
        try:
            run_eval(model, *call)
        finally:
            notes.end()
            notes.allowed = None
            for handle in handles:
                handle.remove()
    return found


class _Looking:
    """A hook that notes which of the classes that are off aren't zero where a layer reads them."""

    def __init__(self, classes: Tensor, on: Tensor, found: Tensor):
        self._classes, self._on, self._found = classes, on, found

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        read = self._classes[layout_of(module).nonzero(args[0]).cpu()]
        self._found[read[~self._on[read]]] = True


@contextmanager
def shifting_norms(model: nn.Module) -> Iterator[None]:
    """Inside, all vectors are such that norms make positive values of zeros: as trained, but not by chance.

    Norms that aren't trained yet leave zeros as they are.
    """
    vectors = {name: tensor for name, tensor in named_tensors(model).items() if tensor.ndim == 1}
    before = {name: tensor.clone() for name, tensor in vectors.items() if tensor.is_floating_point()}
    with torch.no_grad():
        for name in before:
            vectors[name].fill_(-1.0 if name.endswith("running_mean") else 1.0)
    try:
        yield
    finally:
        with torch.no_grad():
            for name, value in before.items():
                vectors[name].copy_(value)
