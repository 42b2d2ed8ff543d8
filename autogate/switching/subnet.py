"""One subnet of a switchable network: an overlay, the tensors that are its own, and slices of the shared ones."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from autogate.switching.own_tensors import OwnTensor
from autogate.switching.structure import Structure
from rewriters import UndoLog
from rewriters.slimming import Overlay, Place, refresh_flat_weights


class Subnet:
    """A subnet that a model's modules can be switched to.

    Slices of the shared tensors are kept until one of these changes. A forward that gradients come from needs slices
    that lead back to the shared tensors; those taken without gradients are taken anew then.

    Args:
        structure: its channels.
        overlay: what it has in another form than the dense model.
        own: tensors that only it has.

    Attributes:
        first_statistics: of a width that was never trained: some of the statistics that its batch norms started with,
            which are those of other widths.
        places: where it has another tensor than the dense model.
        timed: seconds of its forward over one sample, and what machine that is on; None if it wasn't measured.
        whole: where it has the dense tensors, and other subnets don't. They stand in the modules' `__dict__` all the
            same: compiled code looks at what is there, and would not notice if nothing were.
    """

    def __init__(self, structure: Structure, overlay: Overlay, own: list[OwnTensor]):
        self.structure, self.overlay, self.own = structure, overlay, own
        self.whole: list[Place] = []
        self.first_statistics: tuple[float, ...] = ()
        self.timed: tuple[dict[str, Any], float] | None = None
        places = {place for one in own for place in one.places}
        self.places = (*places, *(place for one in overlay.slices for place in one.places if place not in places))
        self._shared = [one for one in overlay.slices if not places.intersection(one.places)]
        self._recurrent = [one.module for one in overlay.fields if one.name == "_flat_weights"]
        self._kept: tuple[Any, list[Tensor]] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": None}

    def put(self) -> None:
        """Put the subnet's tensors, as the shared ones are now, before those that the modules own."""
        self._put(self._slices())

    def put_after(self, other: Subnet) -> None:
        """Put the subnet's tensors, sizes and forwards over those of another one, which has tensors at the same places.

        If its slices can't be taken, the other one stays as it is.
        """
        slices = self._slices()
        other.overlay.remove_fields()
        self.overlay.put_fields()
        self._put(slices)

    def _put(self, slices: list[Tensor]) -> None:
        for one, tensor in zip(self._shared, slices, strict=True):
            for place in one.places:
                place.put(tensor)
        for own in self.own:
            own.put()
        for place in self.whole:
            place.put(place.own())
        for module in self._recurrent:
            refresh_flat_weights(module, UndoLog())

    def forget(self) -> None:
        """Keep no slices."""
        self._kept = None

    def remove(self) -> None:
        """Give the modules the dense model's tensors, sizes and forwards again."""
        self.overlay.remove()
        for place in (*self.whole, *self.places):
            place.clear()

    @contextlib.contextmanager
    def without_slices(self) -> Iterator[None]:
        """Inside, no slice is there: PyTorch copies no tensor that was computed, and whole tensors for their views."""
        put = [(place, place.module.__dict__.pop(place.name, None)) for one in self._shared for place in one.places]
        try:
            yield
        finally:
            for place, tensor in put:
                if tensor is not None:
                    place.put(tensor)

    def indices(self, place: Place) -> Tensor:
        """Which indices it has of a tensor with one dimension, int64."""
        cuts = next((one.cuts for one in self.overlay.slices if place in one.places), ())
        return cuts[0][1] if cuts else torch.arange(len(place.own()))

    def spread_own(self, place: Place) -> tuple[Tensor, Tensor]:
        """What it has for a tensor with one dimension, in the dense one's shape, and where it has anything (bool)."""
        dense = place.own().detach()
        if not self.own:  # the dense model
            return dense, torch.ones_like(dense, dtype=torch.bool)
        spread, known = torch.zeros_like(dense), torch.zeros_like(dense, dtype=torch.bool)
        for one in self.own:
            if place in one.places:
                indices = self.indices(place).to(dense.device)
                spread[indices], known[indices] = one.at.own().detach(), True
        return spread, known

    @property
    def calibrated(self) -> bool:
        """Whether its batch norms have statistics of its own, and not those that they started with."""
        return not self.first_statistics or self.statistics() != self.first_statistics

    def statistics(self) -> tuple[float, ...]:
        """The first mean and variance of each of its batch norms."""
        own = [one for one in self.own if one.places[0].name in ("running_mean", "running_var")]
        return tuple(float(one.at.own()[0]) for one in own)

    @property
    def kept_bytes(self) -> int:
        """Memory of the slices that are kept now, without views of the dense tensors."""
        slices = () if self._kept is None else zip(self._shared, self._kept[1], strict=True)
        return sum(tensor.nbytes for one, tensor in slices if not one.is_view)

    def _slices(self) -> list[Tensor]:
        dense = [one.places[0].own() for one in self._shared]
        learns = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in dense)
        version = tuple((id(tensor), tensor.data_ptr(), _version_of(tensor)) for tensor in dense)
        if self._kept is not None:
            found, tensors = self._kept
            if found == version and (not learns or any(tensor.requires_grad for tensor in tensors)):
                return tensors
        tensors = [one.take() for one in self._shared]
        self._kept = (version, tensors)
        return tensors


def _version_of(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version
