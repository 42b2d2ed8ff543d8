"""Stages: modules that run the images of a batch in a few groups, each with the channels of its prototype."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from autogate.inputs import Inputs
from autogate.saliency import CountedLayer, Layout, Note, Notes, layout_of
from autogate.skipping.prototypes import Prototypes
from rewriters import run_eval

LEAST_CHANNELS = 8
"""Of what a stage reads: a prototype is read off their means."""


class StageForward:
    """The forward of a stage: images of one prototype run together, and compute no channel that it lacks.

    It shadows the module's own, on the instance. In train mode, with gradients, and compiled, that runs. Exported or
    traced, it computes all channels, and multiplies those by zero that an image's prototype lacks.

    Args:
        module: the stage.
        notes: take the calls of each forward.
        prototypes: of the stage.
        layout: of what it takes.
    """

    def __init__(self, module: nn.Module, notes: Notes, prototypes: Prototypes, layout: Layout):
        self.module, self.notes, self.prototypes, self.layout = module, notes, prototypes, layout
        self.earlier = module.__dict__.get("forward")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self._takes(args, kwargs):
            return self._own(*args, **kwargs)
        (x,) = args
        if _is_exported():
            return self._masked(x)
        if self.prototypes.bias.device != x.device:
            self.prototypes = self.prototypes.to(x.device)
        of = self.prototypes.of(self.layout.means(x))
        groups = [(of == one).nonzero().flatten() for one in of.unique().tolist()]
        notes, begun, alive = self.notes, len(self.notes.calls), self.notes.alive
        made, runs = [], []
        after: list[Any] = []
        try:
            for images in groups:
                one = int(of[images[0]])
                notes.allowed = {layer: code[one] for layer, code in self.prototypes.codes.items()}
                notes.alive = None if alive is None else alive[images]
                made.append(self._own(x if len(groups) == 1 else x[images]))
                runs.append(notes.calls[begun:])
                after.append(notes.alive)
                del notes.calls[begun:]
        finally:
            notes.allowed = None
        back = torch.cat(groups).argsort()
        notes.calls += _merged(runs, back)
        notes.alive = None if after[0] is None else torch.cat(after)[back]
        return made[0] if len(groups) == 1 else torch.cat(made)[back]

    def _masked(self, x: Tensor) -> Any:
        """All images at once, each with the channels of its prototype."""
        of = self.prototypes.of(self.layout.means(x))
        self.notes.allowed = {layer: code[of] for layer, code in self.prototypes.codes.items()}
        try:
            return self._own(x)
        finally:
            self.notes.allowed = None

    def _takes(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether this call is one whose images can have prototypes."""
        compiled = torch.compiler.is_compiling() and not _is_exported()
        return (
            not (compiled or torch.is_grad_enabled())
            and not self.module.training
            and self.notes.running
            and self.notes.allowed is None
            and len(args) == 1
            and not kwargs
            and (type(args[0]) is Tensor or (_is_exported() and isinstance(args[0], Tensor)))
            and args[0].ndim >= 3
            and args[0].shape[0] > 0
            and (self.notes.alive is None or len(self.notes.alive) == len(args[0]))
        )

    def _own(self, *args: Any, **kwargs: Any) -> Any:
        forward = self.earlier if self.earlier is not None else type(self.module).forward.__get__(self.module)
        return forward(*args, **kwargs)


def _is_exported() -> bool:
    """Whether a model is being exported or traced: what is made then runs any images."""
    return torch.compiler.is_exporting() or torch.jit.is_tracing()


def _merged(runs: Sequence[Sequence[Note]], back: Tensor) -> list[Note]:
    """The calls of all groups as those of one batch; `back` has the place of each image in the groups."""
    found = []
    for notes in zip(*runs, strict=True):
        first = notes[0]
        positions = sum(note.positions for note in notes)
        scores, made = (
            None if one[0] is None else torch.cat(one)[back] for one in zip(*(note[2:] for note in notes), strict=True)
        )
        found.append(Note(first.layer, positions, scores, made))
    return found


@dataclass(frozen=True, eq=False)
class Stage:
    """A module that can run images in groups.

    Attributes:
        path: of the module.
        layers: the numbers of the layers in it that choose.
        layout: of what it takes: that of the first layer in it.
    """

    path: str
    layers: tuple[int, ...]
    layout: Layout


def stages_in(
    model: nn.Module, layers: Sequence[CountedLayer], shapes: Mapping[str, Sequence[torch.Size | None]]
) -> list[Stage]:
    """The outermost modules that can be stages.

    They take one feature map and return one, once in a forward, and at least two layers in them choose. No layer in
    them follows one outside, which has chosen for the whole batch.

    Args:
        model: the model.
        layers: of the model, in the order they run.
        shapes: of what its modules take: see `maps_in`.
    """
    found: list[Stage] = []
    for path, _ in model.named_modules():
        inside = tuple(number for number, layer in enumerate(layers) if _is_in(path, layer) and layer.kind == "chosen")
        taken = any(path.startswith(f"{stage.path}.") for stage in found)
        maps = shapes.get(path, [])
        if path and not taken and len(inside) >= 2 and len(maps) == 1 and maps[0] and not _follows(path, layers):
            first, layout = first_in(model, path, layers)
            if maps[0][layout.channel] == len(first.inputs) >= LEAST_CHANNELS:
                found.append(Stage(path, inside, layout))
    return found


def _follows(path: str, layers: Sequence[CountedLayer]) -> bool:
    """Whether a layer in a module follows one outside."""
    outside = [layer.outputs for layer in layers if layer.kind == "chosen" and not _is_in(path, layer)]
    chosen = torch.cat(outside) if outside else torch.zeros(0, dtype=torch.long)
    followers = (layer.outputs for layer in layers if layer.kind == "follows" and _is_in(path, layer))
    return any(bool(torch.isin(own[own >= 0], chosen).any()) for own in followers)


def first_in(model: nn.Module, path: str, layers: Sequence[CountedLayer]) -> tuple[CountedLayer, Layout]:
    """The first layer that runs inside of a module, and where its channels lie."""
    first = next(layer for layer in layers if _is_in(path, layer))
    return first, layout_of(model.get_submodule(first.path))


def _is_in(path: str, layer: CountedLayer) -> bool:
    return layer.path.startswith(f"{path}.")


def maps_in(model: nn.Module, call: Inputs) -> dict[str, list[torch.Size | None]]:
    """The shapes of what modules take in each of their calls, by path, in one forward in eval mode.

    None for a call that doesn't take one feature map, all else being equal, and return one of as many images.
    """
    found: dict[str, list[torch.Size | None]] = {}
    handles = []
    for path, module in model.named_modules():

        def note(module: nn.Module, args: Any, kwargs: Any, output: Any, path: str = path) -> None:
            single = len(args) == 1 and not kwargs and isinstance(args[0], Tensor) and isinstance(output, Tensor)
            maps = single and args[0].ndim >= 3 and len(output) == len(args[0])
            found.setdefault(path, []).append(args[0].shape if maps else None)

        handles.append(module.register_forward_hook(note, with_kwargs=True))
    try:
        run_eval(model, *call)
    finally:
        for handle in handles:
            handle.remove()
    return found
