"""A few codes for all images: which channels the images of each prototype may use, and how images find theirs."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

STARTS, ROUNDS = 8, 20
"""Runs of k-means, and most rounds of each."""

RIDGE = 1e-2
"""Of the readout: added to the variance of each feature, which is one."""


@dataclass(frozen=True, eq=False)
class Prototypes:
    """The prototypes of a stage: images of one prototype run together.

    Attributes:
        codes: by the number of each layer, bool of shape (prototypes, channels): what their images may use.
        weight, bias: the readout: an image belongs to the prototype with the largest `weight d + bias`, where d is the
            mean over positions of what the stage reads. Shapes (prototypes, features) and (prototypes,).
    """

    codes: dict[int, Tensor] = field(repr=False)
    weight: Tensor = field(repr=False)
    bias: Tensor = field(repr=False)

    def __len__(self) -> int:
        return len(self.bias)

    def of(self, descriptors: Tensor) -> Tensor:
        """The prototype of each image, int64 of shape (images,), from their descriptors (images, features)."""
        return (descriptors.to(self.weight.dtype) @ self.weight.T + self.bias).argmax(1)

    def to(self, device: torch.device) -> Prototypes:
        """The same on a device."""
        codes = {layer: code.to(device) for layer, code in self.codes.items()}
        return Prototypes(codes, self.weight.to(device), self.bias.to(device))


def chosen(codes: dict[int, Tensor], descriptors: Tensor, count: int) -> Prototypes:
    """Choose prototypes for the images of a calibration.

    Images with like codes are gathered (k-means). A linear readout of the descriptors learns to tell the clusters
    apart, and each prototype gets the channels that most of the images use which the readout sends to it: as many that
    these images compute as much as by their own codes.

    Args:
        codes: by the number of each layer, bool of shape (images, channels).
        descriptors: shape (images, features).
        count: of prototypes, at least 1.
    """
    layers, sizes = list(codes), [code.shape[1] for code in codes.values()]
    joined = torch.cat([code.float() for code in codes.values()], 1)
    weight, bias = _readout(descriptors.float(), _clusters(joined, count))
    of = (descriptors.float() @ weight.T + bias).argmax(1)
    found = sorted(set(of.tolist()))  # a prototype that no image goes to isn't kept
    shares = torch.stack([joined[of == one].mean(0) for one in found])
    images = torch.tensor([float((of == one).sum()) for one in found])
    made = _most_used(shares, images, float(joined.sum()))
    parts = made.split(sizes, 1)
    return Prototypes(dict(zip(layers, parts, strict=True)), weight[found], bias[found])


def _clusters(codes: Tensor, count: int) -> Tensor:
    """The cluster of each image: the tightest of several runs of k-means."""
    random = torch.Generator().manual_seed(0)
    runs = [_cluster(codes, codes[torch.randperm(len(codes), generator=random)[:count]]) for _ in range(STARTS)]
    return min(runs, key=lambda run: run[0])[1]


def _cluster(codes: Tensor, centers: Tensor) -> tuple[float, Tensor]:
    """The sum of distances after k-means, and the cluster of each image."""
    for _ in range(ROUNDS):
        nearest = torch.cdist(codes, centers).min(1)
        parts = [codes[nearest.indices == one] for one in range(len(centers))]
        moved = torch.stack(
            [part.mean(0) if len(part) else center for part, center in zip(parts, centers, strict=True)]
        )
        if torch.equal(moved, centers):
            break
        centers = moved
    return float(nearest.values.sum()), nearest.indices


def _readout(descriptors: Tensor, of: Tensor) -> tuple[Tensor, Tensor]:
    """Weight and bias of a ridge regression from standardised descriptors to the clusters."""
    mean, scale = descriptors.mean(0), descriptors.std(0, correction=0).clamp(min=1e-6)
    x = ((descriptors - mean) / scale).double()
    wanted = torch.nn.functional.one_hot(of).double()
    base = wanted.mean(0)
    gram = x.T @ x / len(x) + RIDGE * torch.eye(x.shape[1], dtype=x.dtype)
    weight = torch.linalg.solve(gram, x.T @ (wanted - base) / len(x)).T / scale
    return weight.float(), (base - weight @ mean.double()).float()


def _most_used(shares: Tensor, images: Tensor, total: float) -> Tensor:
    """The channels of each prototype, bool, shape (prototypes, channels).

    Args:
        shares: of a prototype's images that use a channel.
        images: of each prototype.
        total: how many channels all images use; they get as many.
    """
    order = shares.flatten().argsort(descending=True, stable=True)
    each = images[:, None].expand_as(shares).flatten()[order]
    taken = each.cumsum(0) <= total
    made = torch.zeros(shares.numel(), dtype=torch.bool)
    made[order[taken]] = True
    return made.view_as(shares) & (shares > 0)
