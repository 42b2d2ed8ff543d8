"""The gates of a model and how they learn, all of it between one optimizer step and the next.

A gate multiplies an input channel of a convolution or linear layer, and that is the same as multiplying the
kernel along its input dimension. So gates live *in* the kernels: a gated model's weight is always V = W g,
with W the kernel that plain training would see. Forward and backward know nothing of gates. What a gate's
gradient would have been can be read off V's:

    dL/dg_i = <dL/dV[.., i], V[.., i]> / g_i, summed over the sides that carry class i,

and when a gate has moved, its columns are multiplied by the ratio of the new gate to the old one.

Guo et al., "GDP: Stabilized Neural Network Pruning via Gates with Differentiable Polarization".
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from autogate.budget import Targets
from autogate.gating import hooks
from autogate.gating.folding import Foldable, Folding, version_of
from autogate.gating.kernels import GatedKernels, GatedSide, HeldBack
from autogate.gating.progress import Progress
from autogate.gating.sharding import local
from autogate.methods import Gates, Learner, Standing, gate_value
from autogate.steering import Pressure, Schedule, groups_of, with_needed
from rewriters import AutogateError, ChannelMap, Side

BANK = "autogate"
"""Name of the submodule that holds the gates while they train."""

NEARLY_CLOSED = 0.5
"""Below this gate a column follows the optimizer only in part: see `GateBank.measure`."""


@dataclass(frozen=True)
class _Measurement:
    """What was read before the optimizer's step: dL/dg (None if it isn't there yet), columns to hold back."""

    gradient: Tensor | None
    held: tuple[HeldBack, ...]


class _Memory(NamedTuple):
    """The steps so far, as plain numbers: taken, the controller's integral and verdict, the largest learning rate."""

    steps: int
    integral: float
    settled: bool
    peak: float


class GateBank(nn.Module):
    """One gate for each class of channels of a model, learned towards a budget.

    The bank is registered as a submodule of the model that it gates, and its state, all in buffers, goes
    where the model's goes: state_dict, checkpoints, EMA copies, devices. The gated kernels stay plain
    parameters under their own names. All buffers are of floating-point types, and averages of them over a run's
    course mean what they should: what has died in the model is dead in an average of it.

    Channels are killed by hand with `bank.alpha[classes] = 0` (under `torch.no_grad()`); the model's next
    forward finds them closed (one that is compiled, or captured in a CUDA graph, after `bank.fold()` only).
    Nothing brings a dead class back.

    Building a bank changes no number of the model: the initial gate counts as folded into the kernels.

    Args:
        model: the model that `channel_map` describes.
        channel_map: its classes of channels.
        targets: what shall be left.
        schedule: after how many steps, and in what portions.
        origin: what the caller wants to find again at the end; kept as it is.
        added: weights of layers that were not in the user's model.
        follows: the bank moves by itself with the optimizers' steps. Otherwise `step` has to be called after
            each, and a copy of the gated kernels is kept: they are what the gradients belong to, and have
            moved by then.

    Attributes:
        targets, schedule: as given.
        learner: the mathematics of a step.
        alpha: float32, shape (classes,): learnable gate parameters, 1 at first.
        folded: float32, shape (classes,): the gates that the kernels hold at this moment.
        dead: float32, shape (classes,): above 0 for the classes that have died.
        epsilon: 0-dim float64.
        sensitivity: float64, shape (classes,): how much the loss depends on each gate.
        step_count: 0-dim float64, steps taken.
        balance: 0-dim float64, lambda of the latest step.
        integral: 0-dim float64, the controller's memory.
        settled: 0-dim float64, above 0 once the targets have been met.
        peak: 0-dim float64, the largest learning rate of the kernels so far.
        layout: 0-dim float64, a checksum of where the classes lie: a checkpoint's gates load only where they
            belong.

    Raises:
        AutogateError: if a target lies below what is left when every class is dead, or all that outputs don't
            need, or a gated kernel is not a parameter of the model.
    """

    alpha: Tensor
    folded: Tensor
    dead: Tensor
    epsilon: Tensor
    sensitivity: Tensor
    step_count: Tensor
    balance: Tensor
    integral: Tensor
    settled: Tensor
    peak: Tensor
    layout: Tensor
    origin: Any

    def __init__(
        self, model: nn.Module, channel_map: ChannelMap, targets: Targets, schedule: Schedule,
        origin: Any = None, added: Collection[str] = (), follows: bool = True,
    ):  # fmt: skip
        super().__init__()
        self.follows = follows
        self.channel_map = channel_map
        self.added = frozenset(added)
        self.targets = targets
        self.schedule = schedule
        self.origin = origin
        for target in targets.out_of_reach():
            raise AutogateError(
                f"{target.share:.3f} of the {target.resource.name} can't be reached: {target.resource.least:.3f} are "
                f"left when every channel that may go has gone. {channel_map.why_pinned()}",
                remedy="Ask for a larger share.",
            )
        groups = with_needed(groups_of(channel_map, schedule.round_to), channel_map, targets)
        self.learner = Learner(targets, schedule, groups)
        size = channel_map.size
        start = Gates.fresh(size)
        self.register_buffer("alpha", start.alpha)
        self.register_buffer("epsilon", start.epsilon)
        self.register_buffer("sensitivity", start.sensitivity)
        self.register_buffer("folded", gate_value(start.alpha, start.epsilon))
        self.register_buffer("dead", torch.zeros(size))
        self.register_buffer("step_count", torch.tensor(0.0, dtype=torch.float64))
        self.register_buffer("balance", torch.tensor(0.0, dtype=torch.float64))
        self.register_buffer("integral", torch.tensor(0.0, dtype=torch.float64))
        self.register_buffer("settled", torch.tensor(0.0, dtype=torch.float64))
        self.register_buffer("peak", torch.tensor(0.0, dtype=torch.float64))
        self.register_buffer("layout", torch.tensor(channel_map.checksum(), dtype=torch.float64))
        self._kernels = GatedKernels(model, channel_map)
        self._folding = Folding(self._kernels, channel_map, self._foldable(), keeps=not follows)
        self._forget()
        self.to(next(iter(self.kernels()), self.alpha).device)
        self.hook = model.register_forward_pre_hook(self._before_forward)
        if follows:
            hooks.register(self)
        else:
            self._kernels.keep(self._gated())

    def _forget(self) -> None:
        """Drops all that was worked out from buffers and kernels."""
        self._kernels.forget()
        self._folding.forget()
        self._pending: _Measurement | None = None
        self._standing: tuple[Any, Standing] | None = None
        self._read: tuple[Any, _Memory] | None = None

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        for derived in ("_pending", "_standing", "_read"):
            state[derived] = None
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if self.follows:
            hooks.register(self)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: Any, strict: bool, missing_keys: list[str],
        unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:  # fmt: skip
        layout = state_dict.get(f"{prefix}layout")
        if layout is not None and round(float(layout)) != round(float(self.layout)):
            error_msgs.append(
                f"{prefix.rstrip('.')}: these gates belong to another model, or to this one prepared in another way "
                "(other inputs, `ignore`, `shortcuts` or `embed`). Prepare it as for the checkpoint's run."
            )
            return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        self._folding.write_live(self.dead)

    def _apply(self, fn: Any, recurse: bool = True) -> GateBank:
        # half() and bfloat16() are for the model's numbers: epsilon ends at 5e-8, below what half can hold.
        before = dict(self.named_buffers())
        super()._apply(fn, recurse)
        for name, buffer in self.named_buffers():
            if buffer.dtype != before[name].dtype:
                setattr(self, name, before[name].to(buffer.device))
        self._forget()
        return self

    def detach(self) -> None:
        """Ends the gates' life: no optimizer step and no forward reaches the bank any more."""
        hooks.unregister(self)
        self.hook.remove()

    @property
    def live(self) -> Tensor:
        """The classes that live, bool, shape (classes,)."""
        return self.dead == 0

    @property
    def stands_still(self) -> bool:
        """Whether the gates have learned what they can: see `Learner.is_over`."""
        memory = self._memory()
        return self.learner.is_over(memory.steps, memory.settled)

    def gates(self) -> Tensor:
        """The gates g(alpha), float32, shape (classes,); zero for dead classes."""
        return torch.where(self.live, gate_value(self.alpha, self.epsilon), 0.0)

    def shares(self) -> dict[str, float]:
        """The part that is left of each resource in the budget, all dead classes gone, by its name."""
        return self.targets.shares(self.live.cpu())

    def where(self, label: int) -> list[tuple[Side, int]]:
        """The (side, index) pairs that class `label` takes out when it dies."""
        return self.channel_map.where(label)

    def describe(self, labels: Iterable[int]) -> str:
        """Where the classes lie, for a reader: `conv2.weight[1] at 3, 5; fc.weight[1] at 7`."""
        return self.channel_map.describe(labels)

    def progress(self) -> Progress:
        """Where the bank stands, as plain numbers."""
        memory = self._memory()
        return Progress(
            shares=self.shares(),
            targets=self.targets.wanted(),
            step=memory.steps,
            steps=self.schedule.steps,
            balance=float(self.balance),
            epsilon=float(self.epsilon),
            classes=self.channel_map.size,
            dead=int((~self.live).sum()),
            settled=memory.settled or self._stand().distance <= 0,
        )

    def __repr__(self) -> str:
        now = self.progress()
        shares = ", ".join(f"{name} {share:.3f} -> {now.targets[name]:.3f}" for name, share in now.shares.items())
        return f"GateBank({now.classes} classes, {now.dead} dead, {shares}, step {now.step} of {now.steps})"

    def forward(self, x: Any = None) -> Any:
        """Returns x: gates act from within the kernels. A `Sequential` that is gated calls its bank too."""
        return x

    def kernels(self) -> list[nn.Parameter]:
        """The gated kernels, each once."""
        return list({id(side.weight): side.weight for side in self._gated()}.values())

    def added_weights(self) -> list[tuple[str, nn.Parameter]]:
        """Name and kernel of the layers that were not in the user's model and that learn."""
        model = self._kernels.model()
        named = [] if model is None else [(name, model.get_parameter(name)) for name in sorted(self.added)]
        return [(name, weight) for name, weight in named if weight.requires_grad]

    def _gated(self) -> list[GatedSide]:
        return self._kernels.sides(self.alpha.device)

    @torch.no_grad()
    def fold(self, stepped: bool = False) -> None:
        """Brings the kernels in line with alpha; cheap if nothing has changed since the last time.

        Classes of zero alpha die, the columns of dead classes become exactly zero whatever moved them, and
        the others are multiplied by the ratio of their gate to the one folded before. Where not alpha alone was
        written to, but `folded` and `epsilon` also (in an average of the model, by a checkpoint), the kernels are what
        they shall be, and no column is scaled.

        Args:
            stepped: an optimizer has stepped: not every one that writes to a kernel leaves a trace in its version (a
                sharded kernel's, a CUDA graph's, one that goes by `.data`).

        Raises:
            AutogateError: if a live class's alpha is not finite; nothing is folded then.
        """
        self._folding.fold(self._foldable(), stepped)

    def _foldable(self) -> Foldable:
        return Foldable(self.alpha, self.folded, self.dead, self.epsilon)

    def _before_forward(self, module: nn.Module, args: Any) -> None:
        recorded = torch.compiler.is_compiling() or hooks.is_capturing()
        if not recorded and self._folding.wanted(self._foldable()):
            self.fold()

    @torch.no_grad()
    def measure(self, *, scale: Tensor | float | None = None, later: bool = False) -> None:
        """Reads the gates' gradients from the kernels', to be called before the optimizer moves these.

        A column behind a nearly closed gate is held back: of what the optimizer does to it, `step` lets only
        a part stand, in proportion to the gate's square. That is what a gate in the forward pass comes to: it
        scales the kernel's gradient once and the effect of the kernel's change once more. Without it the
        optimizer would soon fill a column that the gate has emptied, and the gate, on opening, would blow
        that up.

        Args:
            scale: what the gradients are still multiplied by (a GradScaler's scale), if anything.
            later: the gradients come to be within the optimizer's step, of a closure: call `read` after it.
        """
        self._pending = None
        kernels = self._kernels.as_kept(self._gated())
        if not self._folding.knows(self.alpha):
            self.fold()  # alphas set by hand, before they enter the mathematics
        if not self.stands_still:
            gated = self._gated()
            gradient = None if later else self._gradient(gated, kernels, scale)
            closing = self.live & (self.folded < NEARLY_CLOSED)
            part = (self.folded / NEARLY_CLOSED) ** 2
            self._pending = _Measurement(gradient, self._kernels.hold_back(closing, part, gated, kernels))

    @torch.no_grad()
    def read(self) -> None:
        """Reads the gates' gradients when a closure has made them, before the optimizer goes on to use them."""
        if self._pending is not None:
            self._pending = replace(self._pending, gradient=self._gradient_now())

    def discard(self) -> None:
        """Drops what `measure` read: the optimizer is going to skip its step."""
        self._pending = None

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """The gates' step, after the optimizer's own: alpha's proximal step, epsilon's decay, folding.

        A bank that follows the optimizers has both `measure` and this called by their steps (see
        `autogate.gating.hooks`). One that doesn't measures now, on the kernels as they were kept.

        If a gradient is not finite, nothing moves, and the step doesn't count; nor does one of no gradient at no
        rate, by which torch.distributed.checkpoint makes an optimizer's state. Once the targets are met and epsilon is
        at its end, or the budget's steps are over, alpha stays as it is, and nothing is read off gradients. In every
        case the dead columns are exactly zero afterwards.

        Args:
            lr: the kernels' learning rate; alpha's follows its course, from `learning.ALPHA_RATE` at the peak.
        """
        if self._pending is None:
            self.measure()
        measured, self._pending = self._pending, None
        if measured is not None:
            self._kernels.release(measured.held)
            gradient = self._gradient_now() if measured.gradient is None else measured.gradient
            if torch.isfinite(gradient).all() and (lr or gradient.any()):
                self._learn(gradient, lr)
        elif lr:
            self._stand_still()
        self.fold(stepped=True)

    def _gradient(
        self, gated: list[GatedSide], kernels: dict[int, Tensor], scale: Tensor | float | None = None
    ) -> Tensor:
        """dL/dg of every class, float32, shape (classes,); NaN throughout if any kernel's is not finite.

        `kernels` are, by place, what the gradients were taken at.
        """
        total = self._kernels.products(gated, kernels, self.alpha.dtype)
        if scale is not None:
            total = total / scale
        gradient = torch.where(self.live, total[:-1] / self.folded, 0.0)
        return torch.where(torch.isfinite(total).all(), gradient, torch.nan)

    def _gradient_now(self) -> Tensor:
        """dL/dg where the gradients were taken at the kernels as they are."""
        gated = self._gated()
        return self._gradient(gated, {side.place: local(side.weight) for side in gated})

    def _learn(self, gradient: Tensor, lr: float) -> None:
        memory = self._memory()
        pressure = Pressure(0.0, memory.integral, memory.settled)
        now = Gates(
            self.alpha, self.live, self.epsilon, self.sensitivity, memory.steps, pressure, memory.peak
        )  # fmt: skip
        after = self.learner.step(now, gradient, lr, self._stand())
        self.alpha.copy_(after.alpha)  # folding sees to `live`
        self.epsilon.copy_(after.epsilon)
        self.sensitivity.copy_(after.sensitivity)
        self.step_count.fill_(after.count)
        self.balance.fill_(after.balance)
        self.integral.fill_(after.pressure.integral)
        self.settled.fill_(after.pressure.settled)
        self.peak.fill_(after.peak)
        memory = _Memory(after.count, after.pressure.integral, after.pressure.settled, after.peak)
        self._read = (self._memory_version(), memory)

    def _stand_still(self) -> None:
        """A step in which no gate learns: it counts, as long as the run goes on."""
        memory = self._memory()
        if memory.steps < self.schedule.steps:
            self.step_count.fill_(memory.steps + 1)
            self.balance.zero_()
            self._read = (self._memory_version(), memory._replace(steps=memory.steps + 1))

    def _stand(self) -> Standing:
        """Where the classes that live now stand."""
        version = version_of(self.dead), id(self.dead)
        if self._standing is None or self._standing[0] != version:
            self._standing = (version, self.learner.stand(self.live))
        return self._standing[1]

    def _memory_version(self) -> tuple[Any, ...]:
        buffers = (self.step_count, self.integral, self.settled, self.peak)
        return tuple((id(buffer), version_of(buffer)) for buffer in buffers)

    def _memory(self) -> _Memory:
        """What the buffers have of the steps so far."""
        version = self._memory_version()
        if self._read is None or self._read[0] != version:
            buffers = (self.step_count, self.integral, self.settled, self.peak)
            count, integral, settled, peak = torch.stack([buffer.double() for buffer in buffers]).tolist()
            self._read = (version, _Memory(int(count), integral, bool(settled), peak))
        return self._read[1]
