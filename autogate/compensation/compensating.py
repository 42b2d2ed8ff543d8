"""What closed channels fed into kernels is given back, in closed form, by the channels that stay.

The model runs twice on the same samples. First with its gates as they were: rows of what each kernel reads are noted.
Then closed: right before a kernel's call, what it read is predicted from what is left of it (`prediction.py`), and the
prediction is multiplied into the kernel's live columns. So kernels behind it read what it returns then, whatever lies
between: residual streams, concatenations, norms.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from autogate.compensation.prediction import predict
from autogate.compensation.reading import Place, Reader, count_rows, drawn, place_of
from autogate.compensation.samples import joined
from autogate.criteria import Call, twin_of
from autogate.gating import GateBank
from autogate.inputs import run_on
from rewriters import AutogateError
from rewriters.recording import without_fast_paths


@torch.no_grad()
def compensated(model: nn.Module, bank: GateBank, classes: Tensor, batches: Iterable[Any]) -> dict[str, Tensor]:
    """What a prepared model's tensors become to make up for classes that close.

    In a distributed run every process must call this; tensors are averaged over the processes.

    Args:
        model: a prepared model, its gates folded; it is left as it is.
        bank: its gate bank.
        classes: those that close, int64.
        batches: as for `autogate.close`.

    Returns:
        By their names, the kernels, biases and running means that change.

    Raises:
        AutogateError: there are no batches, they can't be joined, or what a kernel reads is not finite.
    """
    inputs = joined(batches)
    if not len(classes):
        return {}
    twin, own = twin_of(model)
    live = bank.live.cpu()
    reader = Reader(twin, bank.channel_map, live, live.index_fill(0, classes.cpu(), False))
    with without_fast_paths(), reader:
        run_on(twin, inputs)
    own.close(classes)
    writer = Writer(twin, reader)
    with without_fast_paths(), writer:
        run_on(twin, inputs)
    return writer.changed()


class Writer(TorchDispatchMode):
    """While active, compensates each kernel of the closed model right before its first call.

    Args:
        model: the closed model, which is changed.
        reader: has seen the model before its gates closed.
    """

    def __init__(self, model: nn.Module, reader: Reader):
        super().__init__()
        self._calls, self._parts = reader.calls, reader.parts
        self._owned: dict[int, list[tuple[str, Tensor]]] = {}
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            self._owned.setdefault(place_of(tensor)[0], []).append((name, tensor))
        self._constants = {place: reader.constant_of(place) for place in self._parts if reader.is_alone(place)}
        self._changed: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        seen = next(self._calls.of(func, args), None)
        place = None if seen is None else place_of(seen.call.kernel)
        if seen is not None and place in self._constants:
            with torch.utils._python_dispatch._disable_current_modes():
                self._compensate(place, seen.call)
        return func(*args, **(kwargs or {}))

    def _compensate(self, place: Place, call: Call) -> None:
        part, constant = self._parts.pop(place), self._constants.pop(place)
        wanted = torch.cat(part.reads)
        reads = call.reads(len(part.index))
        # A kernel that is called several times is compensated once, for what its calls read before gates closed.
        kept = drawn(reads) if part.lengths == [count_rows(reads)] else wanted
        if not (torch.isfinite(kept).all() and torch.isfinite(wanted).all()):
            raise AutogateError(
                "what it reads is not finite.", where=part.side.tensor, remedy="Check the weights and the batches."
            )
        kernel = call.kernel.movedim(call.dim, -1)
        whole = torch.cat([kernel[..., part.kept], part.lost.movedim(call.dim, -1)], -1).float()
        used = torch.cat([part.kept, part.gone])
        plain = torch.eye(len(part.kept), len(used), device=kernel.device)
        found = predict(kept[:, part.kept], wanted[:, used], plain, whole.flatten(0, -2), constant is not None)
        if found is None:
            return
        kernel[..., part.kept] = found.taken.T.unflatten(0, whole.shape[:-1]).to(kernel)
        self._changed.add(place[0])
        if constant is not None:
            self._add(constant, call, found.constant.unflatten(0, whole.shape[:-1]))

    def _add(self, constant: Place, call: Call, added: Tensor) -> None:
        """Add a constant behind the kernel: to the bias, or off the running mean of the norm.

        Args:
            constant: where it goes.
            call: the kernel's.
            added: for each weight, without the dimension that is summed over.
        """
        assert call.output is not None
        output = call.output - (call.dim < call.output)
        added = added.movedim(output, 0).reshape(added.shape[output], -1).sum(1)
        storage, offset, shape, strides = constant
        (_, owner), *_ = self._owned[storage]
        target = owner.detach().as_strided(shape, strides, offset)
        target += (added if call.bias is not None else -added).to(target)
        self._changed.add(storage)

    def changed(self) -> dict[str, Tensor]:
        """The tensors that were changed, by their names; in a distributed run the mean over the processes."""
        names = {name for key in self._changed for name, _ in self._owned[key]}
        tensors = {name: tensor.detach() for owned in self._owned.values() for name, tensor in owned}
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            gathered: list[set[str] | None] = [None] * dist.get_world_size()
            dist.all_gather_object(gathered, names)
            names = set().union(*(one for one in gathered if one is not None))
            for name in sorted(names):
                tensors[name] = tensors[name].contiguous() / dist.get_world_size()
                dist.all_reduce(tensors[name])
        return {name: tensors[name] for name in names}
