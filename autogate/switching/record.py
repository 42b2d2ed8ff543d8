"""What a file says of a switchable network: how its subnets are made of the dense model again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from autogate.slim import Analysed
from autogate.switching.structure import Structure


@dataclass(frozen=True)
class Sharing:
    """What subnets have for themselves, and what they share.

    Attributes:
        affine: whether weights and biases of batch norms are each subnet's own, beside their statistics.
        nested: whether each subnet has the first channels of every group, so that its slices can be views.
    """

    affine: bool = True
    nested: bool = False


@dataclass(frozen=True)
class Fusing(Analysed):
    """A model that was given subnets, as plain data.

    Attributes:
        modules: the model's modules by path, each as a line of text, without convolutions on shortcuts.
        structures: the subnets' channels, the smallest first, without the dense model.
        branches: for each of them, what was decided of dead branches (`rewriters.Decisions`).
        sharing: what they have for themselves.
        active: number of the active subnet.
        widths: those between subnets that were made since, in that order; `branches` go on with theirs.
        first_statistics: for each of these, some of the statistics that its norms started with (`Subnet.calibrated`).
    """

    modules: Mapping[str, str]
    structures: tuple[Structure, ...]
    branches: tuple[Mapping[str, tuple[bool, ...]], ...]
    sharing: Sharing
    active: int
    widths: tuple[Structure, ...] = ()
    first_statistics: tuple[tuple[float, ...], ...] = ()
