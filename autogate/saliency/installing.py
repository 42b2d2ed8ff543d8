"""Give a model its saliency modules."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from autogate.inputs import Inputs, dtype_of_parameters
from autogate.saliency.bank import SALIENCY, SaliencyBank
from autogate.saliency.counting import CountedLayer, Counting, Fixed, Note, Notes
from autogate.saliency.kinds import classes_of
from autogate.saliency.layout import layout_of
from autogate.saliency.module import NAME, FollowingModule, SaliencyModule
from autogate.saliency.record import Choosing, as_prepared, check_recorded, recorded_zero
from autogate.saliency.run import Run
from autogate.saliency.sites import Known, Layer, layers_in
from autogate.saliency.zeros import nonzero_when_off, shifting_norms
from autogate.slim import PrepareRecord, analyse_channels, as_described, first_difference, form_of
from rewriters import ALWAYS, Analysis, AutogateError, ChannelMap, Side, UndoLog


def install(model: nn.Module, analysis: Analysis, run: Run, origin: PrepareRecord, undo_log: UndoLog) -> SaliencyBank:
    """Give a model its saliency modules, and the bank that they have in common.

    Args:
        model: without gates; changed in place.
        analysis: of its channels.
        run: the training that follows.
        origin: how it was analysed.
        undo_log: takes every change but hooks, which are gone if this raises.

    Raises:
        AutogateError: it has no layer that could choose its channels for each image, or the budget is below what the
            other layers cost.
    """
    layers = layers_in(model, analysis, run.method.reduction)
    if not any(layer.kind == "chosen" for layer in layers):
        raise _no_choice(model, layers)
    placing = _Placing(model, layers, analysis.channel_map, run, undo_log)
    with placing.placed():
        counting = placing.counting(placing.zero(origin))
        _check_budget(model, counting.fixed(placing.notes.calls), run)
        placing.notes.calls = []
        return placing.bank(counting, origin)


def install_again(
    model: nn.Module, record: Choosing, calls: Sequence[Inputs], shapes: Mapping[str, tuple[int, ...]],
    undo_log: UndoLog,
) -> SaliencyBank:  # fmt: skip
    """Give a model saliency modules as a record says. No value of the model matters, and it doesn't run.

    Args:
        model: a model like the one that had them, apart from its weights.
        record: the record.
        calls: example inputs on the model's device, all those that `prepare` got.
        shapes: of the tensors that the modules will get; looked at before any memory is taken.
        undo_log: takes every change but hooks, also if this raises.

    Raises:
        AutogateError: it is another model, or its channels are coupled in another way.
    """
    options = as_described(model, record, calls, undo_log)
    analysis = analyse_channels(model, options)
    known = {layer.path: Known(layer.kind, layer.hidden) for layer in record.layers}
    layers = layers_in(model, analysis, record.run.method.reduction, known)
    placing = _Placing(model, layers, analysis.channel_map, record.run, undo_log)
    wanted = placing.shapes()
    different = first_difference(wanted, {name: shapes.get(name) for name in wanted})
    if different is not None:
        name, here, there = different
        raise AutogateError(f"its shape is {here} for this model, and {there} in the file.", where=name)
    with placing.placed():
        zero = recorded_zero(placing.classes(), analysis.channel_map.size, record)
        counting = as_prepared(placing.counting(zero), record)
        check_recorded(counting, record)
        bank = placing.bank(counting, PrepareRecord(options, dtype_of_parameters(model)))
        bank.measured = record.measured
        return bank


class _Placing:
    """Saliency modules on their way into a model.

    Attributes:
        notes: takes the calls of each forward.
        modules: by the path of their layers.
        handles: of all hooks.
    """

    def __init__(
        self, model: nn.Module, layers: Sequence[Layer], channel_map: ChannelMap, run: Run, undo_log: UndoLog
    ):  # fmt: skip
        self._model, self._layers, self._channel_map, self._run, self._undo_log = (
            model, layers, channel_map, run, undo_log
        )  # fmt: skip
        self._form = form_of(model)
        self.notes = Notes()
        self.modules: dict[str, SaliencyModule] = {}
        self.handles: list[RemovableHandle] = []

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the weights that the modules will have, by name."""
        found: dict[str, tuple[int, ...]] = {}
        for layer in self._layers:
            if layer.kind == "chosen":
                outputs, inputs = self._model.get_parameter(layer.kernel.weight).shape[:2]
                path = f"{layer.kernel.module}.{NAME}".lstrip(".")
                found[f"{path}.reduce.weight"] = (layer.hidden, inputs)
                found[f"{path}.expand.weight"] = (outputs, layer.hidden)
        return found

    @contextmanager
    def placed(self) -> Iterator[None]:
        """Put the modules and their hooks in. If what follows raises, the hooks are gone."""
        try:
            self._place()
            yield
        except BaseException:
            for handle in self.handles:
                handle.remove()
            raise

    def bank(self, counting: Counting, origin: PrepareRecord) -> SaliencyBank:
        """Give the model a bank for its modules."""
        made = SaliencyBank(
            self._model, self.modules, counting, self.notes, self._run, origin, self.handles, self._form
        )  # fmt: skip
        self._undo_log.set(self._model._modules, SALIENCY, made)
        return made

    def _place(self) -> None:
        for number, layer in enumerate(self._layers):
            owner: Any = self._model.get_submodule(layer.kernel.module)
            if layer.scaling is None:
                self.handles.append(owner.register_forward_hook(_Noting(number, self.notes)))
            elif layer.kind == "chosen":
                self._put(owner, layer, self._chosen(number, layer, owner))
            else:
                self._put(owner, layer, self._following(number, layer, owner))

    def _chosen(self, number: int, layer: Layer, owner: Any) -> SaliencyModule:
        assert layer.scaling is not None
        method, (outputs, inputs) = self._run.method, owner.weight.shape[:2]
        module = SaliencyModule(
            inputs, outputs, layout_of(owner), hidden=layer.hidden, layer=number, notes=self.notes,
            published=method.lam is not None, closes=layer.scaling.across, sharpness=method.sharpness,
        )  # fmt: skip
        module.to(owner.weight.device, owner.weight.dtype).train(owner.training)
        self.modules[layer.kernel.module] = module
        self.handles.append(owner.register_forward_pre_hook(module.read, with_kwargs=True))
        return module

    def _following(self, number: int, layer: Layer, owner: Any) -> FollowingModule:
        own = classes_of(self._channel_map, layer.kernel.output_side)
        sources, before = [], self._layers[:number]
        whole = [classes_of(self._channel_map, other.kernel.output_side) for other in before if other.scaling is None]
        for other in before:
            if other.kind == "chosen":
                theirs = classes_of(self._channel_map, other.kernel.output_side)
                place = torch.full((self._channel_map.size + 1,), -1)
                place[theirs] = torch.arange(len(theirs))
                for classes in whole:
                    place[classes] = -1
                place[ALWAYS] = -1
                if (place[own] >= 0).any():
                    sources.append((self.modules[other.kernel.module], place[own]))
        assert layer.scaling is not None
        made = FollowingModule(number, layout_of(owner), sources, self.notes, closes=layer.scaling.across)
        return made.to(owner.weight.device)

    def _put(self, owner: nn.Module, layer: Layer, module: SaliencyModule | FollowingModule) -> None:
        assert layer.scaling is not None
        if NAME in owner._modules:
            raise AutogateError(f"it has a child called {NAME!r}.", where=layer.kernel.module, remedy="Rename it.")
        self._undo_log.set(owner._modules, NAME, module)
        scaled = self._model.get_submodule(layer.scaling.path)
        self.handles.append(owner.register_forward_hook(module.made))
        if layer.scaling.at == "input":
            self.handles.append(scaled.register_forward_pre_hook(module.scale_input))
        else:
            self.handles.append(scaled.register_forward_hook(module.scale))

    def classes(self) -> list[tuple[Tensor, Tensor]]:
        """The classes of the inputs and outputs of each layer."""
        return [self._classes(layer) for layer in self._layers]

    def _classes(self, layer: Layer) -> tuple[Tensor, Tensor]:
        inputs, outputs = (
            classes_of(self._channel_map, side) for side in (self._read(layer), layer.kernel.output_side)
        )
        owner: Any = self._model.get_submodule(layer.kernel.module)
        if layer.scaling is None and getattr(owner, "groups", 1) > 1:  # the kernel has the channels of one group
            inputs, outputs = (torch.full((size,), ALWAYS) for size in (owner.in_channels, owner.out_channels))
        return inputs, outputs

    def _read(self, layer: Layer) -> Side:
        """The side with the channels that a layer reads; a depthwise kernel has them where it makes them."""
        groups = getattr(self._model.get_submodule(layer.kernel.module), "groups", 1)
        return layer.kernel.output_side if groups > 1 else layer.kernel.input_side

    def counting(self, zero: Tensor) -> Counting:
        """How forwards are counted."""
        channel_map, layers = self._channel_map, self._layers
        everything = torch.ones(channel_map.size, dtype=torch.bool)
        counted = []
        for layer in layers:
            kernel, module = layer.kernel, self.modules.get(layer.kernel.module)
            taps = self._model.get_parameter(kernel.weight)[0, 0].numel()
            groups = getattr(self._model.get_submodule(kernel.module), "groups", 1)
            own = module.macs if module is not None else 0
            one = CountedLayer(kernel.module, layer.kind, taps, groups, *self._classes(layer), own, layer.scaling)
            counted.append(replace(one, positions=channel_map.macs(kernel, everything) / one.dense, why=layer.why))
        known = {layer.kernel.weight for layer in layers}
        rest = sum(channel_map.macs(kernel, everything) for kernel in channel_map.kernels if kernel.weight not in known)
        return Counting(tuple(counted), zero, rest)

    def zero(self, origin: PrepareRecord) -> Tensor:
        """The classes that are zero where all that make them are off, bool, (classes,)."""
        channel_map, reads, makes = self._channel_map, {}, {}
        for number, layer in enumerate(self._layers):
            if layer.kind != "whole":
                reads[layer.kernel.module] = classes_of(channel_map, self._read(layer))
            if layer.kind == "chosen":
                makes[number] = classes_of(channel_map, layer.kernel.output_side)
        with shifting_norms(self._model):
            call = origin.calls_for(self._model)[0]
            found = nonzero_when_off(self._model, self.notes, call, reads, makes, channel_map.size)
        for layer in self._layers:
            if layer.scaling is None:
                found[classes_of(channel_map, layer.kernel.output_side)] = True
        return ~found[:-1]


def _no_choice(model: nn.Module, layers: Sequence[Layer]) -> AutogateError:
    why = "; ".join(f"{layer.kernel.module}: {layer.why}" for layer in layers if layer.why)
    return AutogateError(
        f"it has no layer that could choose its channels for each image. {why or 'It has no convolutions or MLPs'}.",
        where=type(model).__name__,
        remedy="autogate.prepare removes channels for all images alike, of any layer.",
    )


def _check_budget(model: nn.Module, fixed: Fixed, run: Run) -> None:
    """Raise if the budget is below what is computed for every image."""
    if fixed.share >= run.flops:
        raise AutogateError(
            f"flops is {run.flops:g}, and {fixed.share:.1%} of the FLOPs are in what runs whole for every image: "
            f"{', '.join(fixed.paths)}.",
            where=type(model).__name__,
            remedy="Ask for a larger share.",
        )


class _Noting:
    """A hook that notes the calls of a layer which computes all of its outputs."""

    def __init__(self, layer: int, notes: Notes):
        self._layer, self._notes = layer, notes

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        self._notes.add(Note(self._layer, layout_of(module).positions(output)))
