"""The Saliency-and-Pruning Module of one layer (Chen et al., "Self-Adaptive Network Pruning", section 3).

The layer is a convolution, as in the paper, or a linear one. The module reads the layer's input, and gives each output
channel of each image a score. It decides whether the channel is computed, and scales it behind the norm:

    d = mean over positions of x                          (equation 5)
    s = 1 + W2 relu(W1 d) + bias                          (equation 6)
    q = 1 + sharpness (s - 1)
    s1 = max(0, min(1, 1.2 sigmoid(q + noise) - 0.1))     (equation 7)
    s2 = 1 where s1 > 0.5, which is where q + noise > 0   (equation 8)
    y = s b norm(layer(x)), with b = s1 or s2             (equation 3)

The one, the bias and q aren't in the paper. W2 and the bias are zero at first: all scores are one, so outputs are what
they were; and weight decay takes scores back to one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autogate.saliency.counting import Note, Notes
from autogate.saliency.layout import Layout
from autogate.saliency.penalty import penalised

STRETCH, SHIFT = 1.2, 0.1
"""a and b of equation 7 (Kaiser and Sutskever, "Neural GPUs Learn Algorithms")."""

NAME = "saliency"
"""What the module is called among the children of its convolution."""


def binarized(scores: Tensor, noise: Tensor, soft: Tensor) -> Tensor:
    """Equations 7 and 8 in training: the code of each channel of each image; gradients always go to s1.

    Args:
        scores: shape (images, channels).
        noise: of that shape.
        soft: bool, shape (images, 1): which images get s1; the others get s2.
    """
    s1 = (STRETCH * torch.sigmoid(scores + noise) - SHIFT).clamp(0, 1)
    s2 = (s1 > 0.5).to(s1.dtype)
    return torch.where(soft, s1, s1 + (s2 - s1).detach())


class SaliencyModule(nn.Module):
    """Scores the output channels of a layer for each image, and says which are computed.

    Its hooks are on the layer and on the norm behind it. A child of its layer, it doesn't run by itself.

    Args:
        inputs, outputs: channels of the layer.
        layout: where they lie.
        hidden: rows of W1.
        layer: number of the layer in `notes`.
        notes: takes the scores of each forward.
        published: whether the penalty is the paper's to the letter.
        closes: whether channels that are off are zero before the norm too, because it takes statistics across them.
        sharpness: see `SANP`.

    Attributes:
        reduce: W1, weight of shape (hidden, inputs).
        expand: W2, weight of shape (outputs, hidden), and the bias.
        push, level: 0-dim, see `penalised`.
        noise: 0-dim, standard deviation of the noise of equation 7.
        soft: 0-dim, the share of images that get s1 in training.
        threshold: 0-dim, what q must exceed for the channel to be computed.
        open: bool, (images, outputs): the channels that aren't zero in the latest forward.
        pending: scores and code of a call whose output isn't scaled yet, both (images, outputs); else None.
    """

    push: Tensor
    level: Tensor
    noise: Tensor
    soft: Tensor
    threshold: Tensor

    def __init__(
        self, inputs: int, outputs: int, layout: Layout, hidden: int, layer: int, notes: Notes, published: bool,
        closes: bool, sharpness: float = 1.0,
    ):  # fmt: skip
        super().__init__()
        self.reduce = nn.Linear(inputs, hidden, bias=False)
        self.expand = nn.Linear(hidden, outputs)
        nn.init.zeros_(self.expand.weight)
        nn.init.zeros_(self.expand.bias)
        for name in ("push", "level", "noise", "soft", "threshold"):
            self.register_buffer(name, torch.zeros(()))
        self.layout, self.layer, self.notes, self.closes = layout, layer, notes, closes
        self.published, self.sharpness = published, sharpness
        self.open: Tensor | None = None
        self.pending: tuple[Tensor, Tensor] | None = None
        self._note: Note | None = None

    @property
    def macs(self) -> int:
        """Multiply-adds of the module itself for one image."""
        return self.reduce.weight.numel() + self.expand.weight.numel()

    def forward(self, x: Tensor) -> Tensor:
        """Equations 5 and 6: scores, shape (images, outputs), of a layer's input."""
        d = self.layout.means(x).to(self.reduce.weight.dtype)
        if not torch.is_autocast_enabled(x.device.type):
            return 1 + self.expand(F.relu(self.reduce(d)))
        with torch.autocast(x.device.type, enabled=False):  # a code must not hang on half precision
            return 1 + self.expand(F.relu(self.reduce(d)))

    def read(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before the layer: score its channels."""
        scores = self(args[0] if args else kwargs["input"])
        decisive = self.decisive(scores)
        code, known = self.code(decisive), decisive.detach()
        self.open = code if code.dtype == torch.bool else code.detach() > 0
        self.pending = scores, code
        made = known > self.threshold if self.training else self.open  # noise isn't counted
        self._note = Note(self.layer, 0.0, known, self.notes.made(made))

    def decisive(self, scores: Tensor) -> Tensor:
        """The values that decide on the channels, of their scores, both (images, outputs)."""
        return scores if self.sharpness == 1 else 1 + self.sharpness * (scores - 1)

    def code(self, scores: Tensor) -> Tensor:
        """Equations 7 and 8: which channels are computed, of what `decisive` returned; in eval mode bool."""
        if not self.training:
            return self.notes.code(self.layer, scores.detach(), self.threshold)
        noise = self.noise * torch.randn_like(scores) - self.threshold
        soft = torch.rand_like(scores[..., :1]) < self.soft
        return binarized(penalised(scores, self.push, self.level, self.published), noise, soft)

    def made(self, module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        """Behind the layer: note what it costs. Before a norm across channels, those that are off are zero."""
        assert self._note is not None and self.open is not None
        self.notes.add(self._note._replace(positions=self.layout.positions(output)))
        self._note = None
        return output * self.layout.broadcast(self.open, output) if self.closes else None

    def scale(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        """Behind the norm: equation 3, unless the layer's forward has done it (`autogate.skipping`)."""
        return self._scaled(output)

    def scale_input(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """The same before the first module inside a norm that has an activation of its own."""
        return self._scaled(args[0]), *args[1:]

    def factor(self) -> Tensor:
        """What the norm's output is to be multiplied by, (images, outputs)."""
        assert self.pending is not None
        scores, code = self.pending
        return scores.clamp(min=torch.finfo(scores.dtype).min) * code  # minus infinity times 0 is NaN

    def _scaled(self, x: Tensor) -> Tensor:
        if self.pending is None:
            return x
        factor, self.pending = self.factor(), None
        return x * self.layout.broadcast(factor, x).to(x.dtype)


class FollowingModule(nn.Module):
    """Closes the channels of a layer, behind its norm, that are closed where another layer chooses them.

    A depthwise convolution and its norm would make a constant of a channel that is zero. The second linear layer of a
    gated MLP is multiplied by the first, which chooses.

    Args:
        layer: number of the layer in `notes`.
        layout: where the channels lie.
        sources: the modules that choose its channels, each with the channel there of each channel here: int64 of
            shape (channels,), -1 where it comes from elsewhere. A channel that comes from none of them stays open.
        notes: takes the call of each forward.
        closes: as of a `SaliencyModule`.

    Attributes:
        places: int64 of shape (sources, channels): the channel of each source, -1 where it comes from elsewhere.
        sources: the modules that choose its channels.
        done: whether channels that are off are zero already, in this call.
    """

    places: Tensor

    def __init__(
        self, layer: int, layout: Layout, sources: Sequence[tuple[SaliencyModule, Tensor]], notes: Notes, closes: bool
    ):  # fmt: skip
        super().__init__()
        self.layer, self.layout, self.notes, self.closes = layer, layout, notes, closes
        self.sources, self.done = tuple(module for module, _ in sources), False
        self.register_buffer("places", torch.stack([index for _, index in sources]), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return `x`: a `nn.Sequential` runs all of its children."""
        return x

    def made(self, module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        """Behind the convolution: note what it costs. Before a norm across channels, those that are off are zero."""
        self.notes.add(Note(self.layer, self.layout.positions(output)))
        return output * self.layout.broadcast(self.open, output).to(output.dtype) if self.closes else None

    def scale(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        """Behind the norm."""
        return self._closed(output)

    def scale_input(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """The same before the first module inside a norm that has an activation of its own."""
        return self._closed(args[0]), *args[1:]

    def _closed(self, x: Tensor) -> Tensor:
        done, self.done = self.done, False
        return x if done else x * self.layout.broadcast(self.open, x).to(x.dtype)

    @property
    def open(self) -> Tensor:
        """Which channels some source has, or none makes, bool, (images, channels)."""
        found = []
        for source, place in zip(self.sources, self.places, strict=True):
            assert source.open is not None
            found.append(F.pad(source.open, (0, 1))[..., place])
        return torch.stack(found).any(0) | (self.places < 0).all(0)
