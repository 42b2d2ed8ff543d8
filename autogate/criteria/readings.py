"""What criteria read: weights by class, gradients and activations over batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from autogate.criteria.batches import Batches, gradients, twin_of
from autogate.criteria.observing import Observer
from autogate.gating import GateBank
from autogate.inputs import run_on
from rewriters import ALWAYS, AutogateError, Side
from rewriters.recording import without_fast_paths


class Slice(NamedTuple):
    """A parameter, seen along one of its dimensions.

    Attributes:
        weight: the parameter's values, detached.
        dim: the dimension that classes lie along.
        classes: the class of each index along it, int64, shape (indices,); `ALWAYS` (-1) for those that stay.
    """

    weight: Tensor
    dim: int
    classes: Tensor

    @property
    def rows(self) -> Tensor:
        """Everything that goes with each index, shape (indices, elements)."""
        moved = self.weight.movedim(self.dim, 0)
        return moved.reshape(len(moved), -1)


class Readings:
    """What a criterion may read of a model with gates.

    Args:
        model: a prepared model, its gates folded.
        bank: its gate bank.
        batches: batches to run the model on, if there are some.
    """

    def __init__(self, model: nn.Module, bank: GateBank, batches: Batches | None = None):
        self._model = model
        self.bank = bank
        self._batches = batches

    @property
    def size(self) -> int:
        """Number of classes."""
        return self.bank.channel_map.size

    def kernels(self) -> list[Slice]:
        """All sides of convolutions and linear layers on which classes lie: where channels are made and read."""
        return self._slices({kernel.weight for kernel in self.bank.channel_map.kernels})

    def scales(self, kind: type[nn.Module] | tuple[type[nn.Module], ...] = nn.Module) -> list[Slice]:
        """The scales of norms: vectors called `weight`, of modules of this kind."""
        kernels = {kernel.weight for kernel in self.bank.channel_map.kernels}
        modules = [(f"{path}.weight".lstrip("."), module) for path, module in self._model.named_modules()]
        names = {name for name, module in modules if isinstance(module, kind)} - kernels
        return [part for part in self._slices(names) if part.weight.ndim == 1]

    def batch_norm_scales(self) -> list[Slice]:
        """The scales of batch norms."""
        return self.scales(_BatchNorm)

    def _slices(self, names: set[str]) -> list[Slice]:
        parameters = dict(self._model.named_parameters(remove_duplicate=False))
        found: dict[tuple[int, int], Slice] = {}  # a tensor with several names counts once
        for side, classes in self.bank.channel_map.classes.items():
            if side.tensor in names and (weight := parameters.get(side.tensor)) is not None:
                found.setdefault((id(weight), side.dim), Slice(weight.detach(), side.dim, classes.to(weight.device)))
        return list(found.values())

    def total(self, parts: Iterable[Slice], values: Callable[[Tensor], Tensor]) -> Tensor:
        """Sum a value of each index over all that a class lies on.

        Args:
            parts: slices of parameters.
            values: from rows of shape (indices, elements) to shape (indices,).

        Returns:
            float64, shape (classes,).
        """
        return self._sums((part.classes, values(part.rows)) for part in parts)[0]

    def _sums(self, pairs: Iterable[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """Sums of values by class, and how many there were: float64, shape (classes,)."""
        total = torch.zeros(2, self.size, dtype=torch.float64)
        for classes, values in pairs:
            classes, values = classes.cpu(), values.to("cpu", torch.float64)
            freed = classes != ALWAYS
            total[0].index_add_(0, classes[freed], values[freed])
            total[1].index_add_(0, classes[freed], torch.ones_like(values[freed]))
        return total[0], total[1]

    @cached_property
    def groups(self) -> Sequence[Tensor]:
        """The classes of each group, those that lie on the same sides: int64."""
        return [torch.tensor(group.classes) for group in self.bank.learner.groups]

    def relative(self, scores: Tensor) -> Tensor:
        """Scores in units of the mean of their group, so that large layers and small ones can be compared.

        Live classes with a finite score make the mean. Where it is zero, scores stay as they are.
        """
        counted = self.bank.live.cpu() & torch.isfinite(scores)
        relative = scores.clone()
        for classes in self.groups:
            mean = scores[classes[counted[classes]]].mean()
            if mean > 0:
                relative[classes] /= mean
        return relative

    def gradients(self) -> Iterator[Tensor]:
        """For each batch, the slope of its loss by each gate times the gate: float64, shape (classes,).

        It is <dL/dV, V>, summed over all kernels V that read the class. To first order, closing the gate changes the
        loss by minus this.
        """
        return gradients(self._model, self._given_batches())

    def activations(self) -> Iterator[Tensor]:
        """For each batch, the mean absolute value of each class's channels, where kernels read them.

        Infinite for classes that only kernels computed in the forward read. float64, shape (classes,).
        """
        twin, _ = twin_of(self._model)
        seen: list[tuple[Tensor, Tensor]] = []
        classes = self.bank.channel_map.classes

        def tell(side: Side, index: Tensor, rows: Tensor) -> None:
            if side in classes:
                seen.append((classes[side].to(index.device)[index], rows.abs().mean(0)))

        for batch in self._given_batches():
            seen.clear()
            with torch.no_grad(), without_fast_paths(), Observer(twin, self.bank.channel_map, tell):
                run_on(twin, batch)
            total, count = self._sums(seen)
            yield torch.where(count > 0, total / count.clamp(min=1), torch.inf)

    def _given_batches(self) -> Batches:
        if self._batches is None:
            raise AutogateError("this criterion needs batches, and none were given.", where="close")
        return self._batches
