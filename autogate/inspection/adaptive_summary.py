"""What images cost in a model that chooses its channels for each image, and what they use of each layer."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace

from rich.markup import escape
from rich.table import Table
from torch import nn

from autogate.files import DataConfig, data_config_of
from autogate.inspection.printing import Printed, short
from autogate.saliency import SaliencyBank, known_use


@dataclass(frozen=True)
class AdaptiveLayer:
    """A convolution or linear layer.

    Attributes:
        module: its path.
        kind: "chosen" if it has a saliency module, "follows" for a depthwise one that computes the channels that come
            on, "reads" if it computes all of its outputs from the inputs that aren't zero, "whole" if it computes
            everything for every image.
        channels: number of its outputs.
        all_macs: multiply-adds for one image with all channels.
        own: multiply-adds of its saliency module.
        never, sometimes, always: number of channels that no image, some or all of them use; None if nothing is known.
        mean: the share of its channels that an image uses on average.
        why: why it doesn't choose, if others like it do.
    """

    module: str
    kind: str
    channels: int
    all_macs: float
    own: int = 0
    never: int | None = None
    sometimes: int | None = None
    always: int | None = None
    mean: float | None = None
    why: str = ""


@dataclass(frozen=True)
class AdaptiveSummary(Printed):
    """What is known of a model that chooses its channels for each image. Print it for tables; a notebook shows them.

    FLOPs are multiply-adds of convolutions and linear layers for one image of the example's size.

    Attributes:
        share: the share of the FLOPs that an image takes on average; None if nothing is known.
        images: how many images that is of, and the use of layers: those of the last `adaptive.use` or
            `adaptive.budget` if the model was not trained since, else those of the latest forward.
        target: the share that was asked for.
        all_flops: FLOPs with all channels.
        own: those of the saliency modules, a part of what an image takes.
        params: number of parameters, without those of the modules.
        own_params: those of the modules.
        layers: all layers, in the order they run.
        step, steps, warm_steps: optimizer steps taken, planned, and in which the modules train alone.
        threshold: what a score must exceed for its channel to be computed.
        data_config: how images become inputs, and the names of the classes, if the model says so.
    """

    share: float | None
    images: int
    target: float
    all_flops: float
    own: int
    params: int
    own_params: int
    layers: tuple[AdaptiveLayer, ...]
    step: int
    steps: int
    warm_steps: int
    threshold: float
    data_config: DataConfig | None = None

    def table(self) -> Table:
        """The layers, as a table of rich: how many channels images never, sometimes and always use."""
        table = Table("layer", "channels", "never", "sometimes", "always", "used", "FLOPs")
        for column in table.columns[1:]:
            column.justify = "right"
        for layer in self.layers:
            counts = (str(count) for count in (layer.never, layer.sometimes, layer.always))
            use = (*counts, f"{layer.mean:.0%}") if layer.mean is not None else (OTHER[layer.kind], "", "", "")
            table.add_row(escape(layer.module), str(layer.channels), *use, short(layer.all_macs))
        return table

    def to_json(self) -> str:
        """All of it as JSON, for other programs."""
        return json.dumps(asdict(self), indent=1)

    def tables(self) -> tuple[Table, ...]:
        """What is printed."""
        return self._totals(), self.table(), *self._reasons()

    def _reasons(self) -> Iterator[Table]:
        """Why layers don't choose."""
        reasons: dict[str, list[AdaptiveLayer]] = {}
        for layer in self.layers:
            if layer.why:
                reasons.setdefault(layer.why, []).append(layer)
        if reasons:
            table = Table("why it doesn't choose", "layers", "FLOPs", "first")
            for why, layers in reasons.items():
                macs = short(sum(layer.all_macs for layer in layers))
                table.add_row(why, str(len(layers)), macs, escape(layers[0].module))
            yield table

    def _totals(self) -> Table:
        table = Table(title="autogate.adaptive", title_justify="left", show_header=False)
        table.add_row("FLOPs (multiply-adds)", short(self.all_flops))
        if self.share is None:
            table.add_row("an image takes", "not known: run the model, or autogate.adaptive.use(model, batches)")
        else:
            table.add_row("an image takes", f"{self.share:.1%} on average of {self.images} images")
        table.add_row("target", f"{self.target:.1%}")
        table.add_row("saliency modules", f"{short(self.own)} FLOPs, {short(self.own_params)} parameters")
        table.add_row("other parameters", short(self.params))
        warms_up = f", of which {self.warm_steps} warm up the modules" if self.warm_steps else ""
        table.add_row("steps", f"{self.step} of {self.steps}{warms_up}")
        table.add_row("threshold", f"{self.threshold:.3g}")
        for name, text in () if self.data_config is None else self.data_config.rows():
            table.add_row(name, escape(text))
        return table


OTHER = {"chosen": "-", "follows": "follows", "reads": "reads", "whole": "whole"}
"""What the table has in place of a layer's use."""


def summarise_adaptive(model: nn.Module, bank: SaliencyBank) -> AdaptiveSummary:
    """Summarise a model that has this saliency bank."""
    known, counting = known_use(bank), bank.counting
    used = {} if known is None else {layer.path: layer for layer in known.layers}
    layers = []
    for layer in counting.layers:
        found = AdaptiveLayer(
            layer.path, layer.kind, len(layer.outputs), layer.positions * layer.dense, layer.own, why=layer.why
        )  # fmt: skip
        if (use := used.get(layer.path)) is not None:
            found = replace(
                found, never=use.never, sometimes=use.sometimes, always=use.always, mean=use.mean
            )  # fmt: skip
        layers.append(found)
    own_params = sum(parameter.numel() for parameter in bank.kernels())
    return AdaptiveSummary(
        share=None if known is None else known.share,
        images=0 if known is None else known.images,
        target=bank.run.flops,
        all_flops=counting.dense,
        own=sum(layer.own for layer in counting.layers),
        params=sum(parameter.numel() for parameter in model.parameters()) - own_params,
        own_params=own_params,
        layers=tuple(layers),
        step=int(bank.step_count),
        steps=bank.run.steps,
        warm_steps=bank.run.warm_steps,
        threshold=float(bank.threshold),
        data_config=data_config_of(model),
    )
