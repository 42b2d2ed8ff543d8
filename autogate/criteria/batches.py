"""Runs over batches, on a copy of the model: its mode, gradients, buffers and hooks stay out of it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

from autogate.gating import BANK, GateBank
from autogate.inputs import on_device_of, run_on
from rewriters import AutogateError
from rewriters.interrupts import let_signals_in


@dataclass(frozen=True)
class Batches:
    """Batches to run a model on, and the loss of what it returns.

    Iterating over it shows a progress bar, if a terminal is there to show it on.

    Attributes:
        batches: yields tensors, mappings of keyword arguments, or tuples or lists whose first item is one of these; the
            others are labels.
        loss: called as `loss(outputs, *labels)`; None takes the attribute `loss` of the outputs.
    """

    batches: Iterable[Any]
    loss: Callable[..., Tensor] | None = None

    def __iter__(self) -> Iterator[Any]:
        console, given = Console(stderr=True), 0
        shown = track(self.batches, "batches", console=console, transient=True, disable=not console.is_terminal)
        for batch in shown:
            let_signals_in()
            given += 1
            yield batch
        if not given:
            raise AutogateError(
                "`batches` yields none.", where="close", remedy="Pass a list or a loader, not yet used."
            )

    def loss_of(self, model: nn.Module, batch: Any) -> Tensor:
        """The loss of a batch, a 0-dim tensor.

        Raises:
            AutogateError: there is no loss, it is not one number, or it depends on no parameter.
        """
        outputs = run_on(model, batch)
        labels = on_device_of(model, batch[1:]) if isinstance(batch, (tuple, list)) else ()
        loss = getattr(outputs, "loss", None) if self.loss is None else self.loss(outputs, *labels)
        if self.loss is None and loss is None:
            raise AutogateError(
                "this criterion needs a loss, and none was given.",
                where="close",
                remedy="Pass loss=, a function of the model's outputs and the labels, cross_entropy for instance.",
            )
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            what = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise AutogateError(f"the loss is {what}; it must be one number.", where="close", remedy="Take its mean.")
        if not loss.requires_grad:
            raise AutogateError(
                "the loss gives no gradient: it doesn't depend on the model's kernels.",
                where="close",
                remedy="Compute it from the outputs, without detach, argmax or no_grad.",
            )
        return loss.reshape(())


def twin_of(model: nn.Module) -> tuple[nn.Module, GateBank]:
    """A copy of a prepared model in eval mode, whose gates no optimizer moves, and its bank."""
    twin = copy.deepcopy(model).eval()
    bank: GateBank = getattr(twin, BANK)
    bank.detach()
    return twin, bank


def gradients(model: nn.Module, batches: Batches) -> Iterator[Tensor]:
    """For each batch, <dL/dV, V> of each class, summed over the kernels V that read it: float64, shape (classes,).

    Raises:
        AutogateError: as for `Batches.loss_of`; or no kernel gets a gradient, or one that is not finite.
    """
    twin, bank = twin_of(model)
    kernels = bank.kernels()
    twin.requires_grad_(False)
    for kernel in kernels:
        kernel.requires_grad_(True)
    for number, batch in enumerate(batches):
        with torch.enable_grad():
            batches.loss_of(twin, batch).backward()
        if all(kernel.grad is None for kernel in kernels):
            raise AutogateError("the loss gives no gradient to any kernel with gates.", where="close")
        products = bank.kernel_sums().gradient_products()
        if not torch.isfinite(products).all():
            raise AutogateError(
                f"a gradient of batch {number} is not finite.", where="close", remedy="Check the loss and the images."
            )
        twin.zero_grad(set_to_none=True)
        yield products.to("cpu", torch.float64)
