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

import weakref
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from autogate import hooks
from autogate.budget import Budget, Pressure, Selection, steer
from autogate.columns import along, column_products, scale_columns, segment_sum
from autogate.polarization import EPSILON_START, epsilon_at, gate_slope, gate_value
from autogate.proximal import shrinkage, soft_threshold
from autogate.resources import Flops
from rewriters.channel_map import ALWAYS, ChannelMap, Side
from rewriters.errors import AutogateError
from rewriters.statistics import write_live

ALPHA_RATE = 0.1
"""Alpha's learning rate as a part of the kernels' (section 4.1)."""

OPEN_ALPHA = 1e-3
"""No gradient takes alpha nearer to zero than this, and no live one is nearer when there is no pressure: at
the epsilon that a run ends with the gate is then open (0.95), so a gate is either that or exactly closed."""

LEAST_ALPHA = 1e-5
"""The least alpha of a live class. Its gate is above 1e-9, small enough to be as good as closed and large
enough for a float32 kernel to be scaled down by it and up again."""

NEARLY_CLOSED = 0.5
"""Below this gate a column follows the optimizer only in part: see `GateBank.measure`."""

FOLD_TOLERANCE = 2**-10
"""A gate's change waits to be folded until it is larger than this part of the gate: it takes a pass over the
kernel, and many steps of training move a gate by less than a ten-thousandth."""


@dataclass(frozen=True)
class Progress:
    """Where a bank stands.

    Attributes:
        share: part of the FLOPs that is left.
        target: part that shall be left.
        step: optimizer steps taken.
        steps: optimizer steps that the run takes.
        balance: lambda of equation 7 in the latest step, with prices relative to the mean price.
        epsilon: the gates' smoothing constant.
        classes: number of gates.
        dead: number of closed ones.
        settled: the target has been met, the dead are final.
    """

    share: float
    target: float
    step: int
    steps: int
    balance: float
    epsilon: float
    classes: int
    dead: int
    settled: bool


@dataclass(frozen=True)
class _HeldBack:
    """Columns behind nearly closed gates as they were before a step, and the part of it that gets through."""

    weight: nn.Parameter
    dim: int
    index: Tensor
    before: Tensor
    part: Tensor


@dataclass(frozen=True)
class _Measurement:
    """What was read before the optimizer's step: dL/dg (None if it isn't there yet), columns to hold back."""

    gradient: Tensor | None
    held: tuple[_HeldBack, ...]


class _Gated(NamedTuple):
    """A gated side: its place among the bank's sides, its dimension and the kernel."""

    place: int
    dim: int
    weight: nn.Parameter


class GateBank(nn.Module):
    """One gate for each class of channels of a model, learned towards a budget.

    The bank is registered as a submodule of the model that it gates, and its state, all in buffers, goes
    where the model's goes: state_dict, checkpoints, EMA copies, devices. The gated kernels stay plain
    parameters under their own names.

    Channels are killed by hand with `bank.alpha[classes] = 0` (under `torch.no_grad()`); the model's next
    forward finds them closed. Nothing brings a dead class back.

    Building a bank changes no number of the model: the initial gate counts as folded into the kernels.

    Args:
        model: the model that `channel_map` describes.
        channel_map: its classes of channels.
        budget: what shall be left, and after how many steps.
        origin: what the caller wants to find again at the end; kept as it is.
        added: weights of layers that were not in the user's model; the budget's share is of the model
            without them.
        follows: the bank moves by itself with the optimizers' steps. Otherwise `step` has to be called after
            each, and a copy of the gated kernels is kept: they are what the gradients belong to, and have
            moved by then.

    Attributes:
        alpha: float32, shape (classes,): learnable gate parameters, 1 at first.
        folded: float32, shape (classes,): the gates that the kernels hold at this moment.
        live: bool, shape (classes,).
        epsilon: 0-dim float64.
        step_count: 0-dim int64, steps taken.
        balance: 0-dim float64, lambda of the latest step.
        integral: 0-dim float64, the controller's memory.
        settled: 0-dim bool, the target has been met.
        layout: 0-dim int64, a checksum of where the classes lie: a checkpoint's gates load only where they
            belong.

    Raises:
        AutogateError: if the target lies below what is left when every class is dead, or a gated kernel is
            not a parameter of the model.
    """

    alpha: Tensor
    folded: Tensor
    live: Tensor
    epsilon: Tensor
    step_count: Tensor
    balance: Tensor
    integral: Tensor
    settled: Tensor
    layout: Tensor
    origin: Any

    def __init__(
        self, model: nn.Module, channel_map: ChannelMap, budget: Budget, origin: Any = None,
        added: Collection[str] = (), follows: bool = True,
    ):  # fmt: skip
        super().__init__()
        self.follows = follows
        self.channel_map = channel_map
        self.added = frozenset(added)
        self.flops = Flops(channel_map, self.added)
        self.budget = budget = replace(budget, start=self.flops.start)
        self.origin = origin
        if budget.flops < self.flops.least_share():
            raise AutogateError(
                f"{budget.flops:.3f} of the FLOPs can't be reached: {self.flops.least_share():.3f} are left "
                f"when every channel that may go has gone. {channel_map.why_pinned()}",
                remedy="Ask for a larger share.",
            )
        groups = [group.classes for group in channel_map.groups()]
        self._selection = Selection(budget, self.flops, groups)
        size = channel_map.size
        self.register_buffer("alpha", torch.ones(size))
        self.register_buffer("epsilon", torch.tensor(EPSILON_START, dtype=torch.float64))
        self.register_buffer("folded", gate_value(self.alpha, self.epsilon))
        self.register_buffer("live", torch.ones(size, dtype=torch.bool))
        self.register_buffer("step_count", torch.tensor(0))
        self.register_buffer("balance", torch.tensor(0.0, dtype=torch.float64))
        self.register_buffer("integral", torch.tensor(0.0, dtype=torch.float64))
        self.register_buffer("settled", torch.tensor(False))
        self.register_buffer("layout", torch.tensor(channel_map.checksum()))
        self._lay_out(channel_map)
        # Weak, for a cycle would keep a deleted model's memory until the garbage collector comes by.
        self._model = weakref.ref(model)
        self._forget()
        self.to(next(iter(self.kernels()), self.alpha).device)
        self.hook = model.register_forward_pre_hook(self._before_forward)
        if follows:
            hooks.register(self)
        else:
            self._keep(self._gated())

    def _lay_out(self, channel_map: ChannelMap) -> None:
        """The classes along all gated sides, end to end; class number `size` stands for the pinned ones."""
        self._sides = tuple(side for side in channel_map.gated if side in channel_map.classes)
        classes = [channel_map.classes[side].cpu() for side in self._sides]
        self._lengths = tuple(len(labels) for labels in classes)
        self._begins = tuple(accumulate(self._lengths, initial=0))
        flat = torch.cat([torch.zeros(0, dtype=torch.int64), *classes])
        self._labels = torch.where(flat == ALWAYS, channel_map.size, flat)
        self._side_of = torch.repeat_interleave(torch.tensor(self._lengths, dtype=torch.int64))

    def _forget(self) -> None:
        """Drops all that was worked out from buffers and kernels."""
        self._homes: list[tuple[dict[str, Any], str]] | None = None
        self._written_at: tuple[Any, ...] | None = None
        self._folded_at: tuple[Any, ...] | None = None
        self._pending: _Measurement | None = None
        self._standing: tuple[Any, float, Tensor] | None = None
        self._read: tuple[Any, tuple[int, Pressure]] | None = None
        self._dead_columns: tuple[Any, list[Tensor]] | None = None
        self._kept: dict[int, Tensor] = {}

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        for derived in ("_homes", "_written_at", "_folded_at", "_pending", "_standing", "_read", "_dead_columns"):
            state[derived] = None
        state["_kept"] = {}
        state["_model"] = self._model()
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        model = state.pop("_model")
        super().__setstate__(state)
        self._model = weakref.ref(model)
        if self.follows:
            hooks.register(self)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: Any, strict: bool, missing_keys: list[str],
        unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:  # fmt: skip
        layout = state_dict.get(f"{prefix}layout")
        if layout is not None and int(layout) != int(self.layout):
            error_msgs.append(
                f"{prefix.rstrip('.')}: these gates belong to another model, or to this one prepared in another way "
                "(other inputs, `ignore` or `shortcuts`). Prepare it as for the run that the checkpoint is from."
            )
            return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        self._write_live()

    def _apply(self, fn: Any, recurse: bool = True) -> GateBank:
        # half() and bfloat16() are for the model's numbers: epsilon ends at 5e-8, below what half can hold.
        before = dict(self.named_buffers())
        super()._apply(fn, recurse)
        for name, buffer in self.named_buffers():
            if buffer.dtype != before[name].dtype:
                setattr(self, name, before[name].to(buffer.device))
        self._labels = self._labels.to(self.alpha.device)
        self._side_of = self._side_of.to(self.alpha.device)
        self._forget()
        return self

    def detach(self) -> None:
        """Ends the gates' life: no optimizer step and no forward reaches the bank any more."""
        hooks.unregister(self)
        self.hook.remove()

    def gates(self) -> Tensor:
        """The gates g(alpha), float32, shape (classes,); zero for dead classes."""
        return torch.where(self.live, gate_value(self.alpha, self.epsilon), 0.0)

    def share(self) -> float:
        """The part of the FLOPs that is left, all dead classes gone."""
        return self._stand()[0]

    def where(self, label: int) -> list[tuple[Side, int]]:
        """The (side, index) pairs that class `label` takes out when it dies."""
        return [
            (side, index)
            for side, classes in self.channel_map.classes.items()
            for index in torch.nonzero(classes == label).flatten().tolist()
        ]

    def describe(self, labels: Iterable[int]) -> str:
        """Where the classes lie, for a reader: `conv2.weight[1] at 3, 5; fc.weight[1] at 7`."""
        lines: dict[Side, list[int]] = {}
        for label in labels:
            for side, index in self.where(label):
                lines.setdefault(side, []).append(index)
        return "; ".join(f"{side} at {', '.join(map(str, sorted(set(at))))}" for side, at in lines.items())

    def progress(self) -> Progress:
        """Where the bank stands, as plain numbers."""
        step, pressure = self._memory()
        share = self.share()
        return Progress(
            share=share,
            target=self.budget.flops,
            step=step,
            steps=self.budget.steps,
            balance=float(self.balance),
            epsilon=float(self.epsilon),
            classes=self.channel_map.size,
            dead=int((~self.live).sum()),
            settled=pressure.settled or share <= self.budget.flops,
        )

    def __repr__(self) -> str:
        now = self.progress()
        return (
            f"GateBank({now.classes} classes, {now.dead} dead, FLOPs {now.share:.3f} -> {now.target:.3f}, "
            f"step {now.step} of {now.steps})"
        )

    def forward(self, x: Any = None) -> Any:
        """Returns x: gates act from within the kernels. A `Sequential` that is gated calls its bank too."""
        return x

    def kernels(self) -> list[nn.Parameter]:
        """The gated kernels, each once."""
        return list({id(weight): weight for _, _, weight in self._gated()}.values())

    def added_weights(self) -> list[tuple[str, nn.Parameter]]:
        """Name and kernel of the layers that were not in the user's model and that learn."""
        model = self._model()
        named = [] if model is None else [(name, model.get_parameter(name)) for name in sorted(self.added)]
        return [(name, weight) for name, weight in named if weight.requires_grad]

    def _gated(self) -> list[_Gated]:
        """The gated sides; of a kernel that goes by several names only the first."""
        model = self._model()
        if model is None:
            return []
        if self._homes is None:
            self._homes = self._locate(model)
        found: dict[tuple[int, int], _Gated] = {}
        for place, ((home, name), side) in enumerate(zip(self._homes, self._sides, strict=True)):
            weight = home[name]
            found.setdefault((id(weight), side.dim), _Gated(place, side.dim, weight))
        return list(found.values())

    def _locate(self, model: nn.Module) -> list[tuple[dict[str, Any], str]]:
        """Each gated side's kernel, by the dictionary that its module keeps it in and its name there.

        That is found once and not at every forward; the parameter itself may be replaced, its module not.
        """
        homes = []
        for side in self._sides:
            path, _, name = side.tensor.rpartition(".")
            try:
                home = model.get_submodule(path)._parameters
            except AttributeError:
                home = {}
            if home.get(name) is None:
                raise AutogateError("this gated kernel is not a parameter of the model.", where=side.tensor)
            homes.append((home, name))
        return homes

    def _spread(self, values: Tensor, pinned: float | bool) -> Tensor:
        """A value per class, laid out along all gated sides; `pinned` where no class is."""
        return torch.cat([values, values.new_full((1,), pinned)])[self._labels]

    def _on_side(self, flat: Tensor, place: int) -> Tensor:
        return flat[self._begins[place] : self._begins[place + 1]]

    @torch.no_grad()
    def fold(self) -> None:
        """Brings the kernels in line with alpha; cheap if nothing has changed since the last time.

        Classes of zero alpha die, the columns of dead classes become exactly zero whatever moved them, and
        the others are multiplied by the ratio of their gate to the one folded before.

        Raises:
            AutogateError: if a live class's alpha is not finite; nothing is folded then.
        """
        gated = self._gated()
        if self._versions(gated) == self._folded_at:
            return
        gate = gate_value(self.alpha, self.epsilon)
        live = self.live & (gate != 0)
        ratio = gate / self.folded
        ratio = torch.where(live & ((ratio - 1).abs() > self._tolerance(gated)), ratio, 1.0)
        ratio = torch.where(live, ratio, 0.0)
        moved = (ratio != 1) & (self.folded != 0)
        scaled, died = self._where_to_scale(moved, live)
        if died:
            self.live.logical_and_(live)
        if scaled or died or self._folded_at is None:
            self.alpha.masked_fill_(~live, 0.0)
            self.folded.copy_(torch.where(moved, gate, self.folded).masked_fill_(~live, 0.0))
        elif self._folded_at[0] != _version(self.alpha):
            self.alpha.masked_fill_(~live, 0.0)
        factor = self._spread(ratio, 1.0)
        dead = self._dead()
        for place, dim, weight in gated:
            if place in scaled:
                scale_columns(weight, dim, self._on_side(factor, place))
            if len(dead[place]):
                weight.index_fill_(dim, dead[place].to(weight.device), 0)
        self._folded_at = self._versions(gated)
        self._write_live()
        if not self.follows:
            self._keep(gated)

    def _write_live(self) -> None:
        """Lets norms across channels look at the live ones, where a class has died since the last time."""
        model, version = self._model(), (_version(self.live), id(self.live))
        if model is not None and self.channel_map.statistics and self._written_at != version:
            write_live(model, self.channel_map, self.live)
            self._written_at = version

    def _keep(self, gated: list[_Gated]) -> None:
        """Remembers the kernels as they are, for the next step to know them by."""
        self._kept = {id(weight): weight.detach().clone() for _, _, weight in gated}

    def _versions(self, gated: list[_Gated]) -> tuple[Any, ...]:
        """Changes whenever a tensor that folding depends on has been written to or replaced."""
        buffers = (self.alpha, self.live, self.folded, self.epsilon)
        return (*map(_version, buffers), *((id(weight), _version(weight)) for _, _, weight in gated))

    def _tolerance(self, gated: list[_Gated]) -> float:
        """Half-precision kernels would round smaller changes than twice their resolution away."""
        types = {weight.dtype for _, _, weight in gated}
        return max([FOLD_TOLERANCE, *(2 * torch.finfo(dtype).eps for dtype in types)])

    def _where_to_scale(self, moved: Tensor, live: Tensor) -> tuple[set[int], bool]:
        """Sides with a column whose gate moved, and whether a class died: all that the host must know."""
        counts = self.alpha.new_zeros(len(self._sides))
        counts.index_add_(0, self._side_of, self._spread(moved, False).to(counts.dtype))
        died = (self.live & ~live).any()
        broken = (self.live & ~torch.isfinite(self.alpha)).any()
        *columns, some_died, some_broke = torch.cat([counts, torch.stack([died, broken]).to(counts)]).tolist()
        if some_broke:
            labels = torch.nonzero(self.live & ~torch.isfinite(self.alpha)).flatten().tolist()
            raise AutogateError(
                f"alpha of {len(labels)} classes is not finite.",
                where=self.describe(labels),
                remedy="Go back to the latest checkpoint in which it is.",
            )
        return {place for place, count in enumerate(columns) if count}, bool(some_died)

    def _dead(self) -> list[Tensor]:
        """Indices of the dead columns of each gated side."""
        version = _version(self.live), id(self.live)
        if self._dead_columns is None or self._dead_columns[0] != version:
            closed = self._spread(~self.live, False).cpu()
            columns = [
                torch.nonzero(self._on_side(closed, place)).flatten().to(self.live.device)
                for place in range(len(self._sides))
            ]
            self._dead_columns = (version, columns)
        return self._dead_columns[1]

    def _before_forward(self, module: nn.Module, args: Any) -> None:
        if not torch.compiler.is_compiling():
            self._fold_if_real()

    def _fold_if_real(self) -> None:
        # functional_call and its kin run the model on tensors that stand in for its parameters.
        if all(isinstance(weight, nn.Parameter) for _, _, weight in self._gated()):
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
            later: the gradients come to be within the optimizer's step (of a closure): `step` reads them.
        """
        self._pending = None
        kept = self._kept
        self._take_note()
        if self._memory()[0] < self.budget.steps:
            gated = self._gated()
            kernels = {place: kept.get(id(weight), weight) for place, _, weight in gated}
            gradient = None if later else self._gradient(gated, kernels, scale)
            self._pending = _Measurement(gradient, self._hold_back(gated, kernels))

    def discard(self) -> None:
        """Drops what `measure` read: the optimizer is going to skip its step."""
        self._pending = None

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """The gates' step, after the optimizer's own: alpha's proximal step, epsilon's decay, folding.

        A bank that follows the optimizers has both `measure` and this called by their steps (see
        `autogate.hooks`). One that doesn't measures now, on the kernels as they were kept.

        If a gradient is not finite, nothing moves, and the step doesn't count. Once the budget's steps are
        over alpha stays as it is. In every case the dead columns are exactly zero afterwards.

        Args:
            lr: the kernels' learning rate; alpha's is a tenth of it, without weight decay.
        """
        if self._pending is None:
            self.measure()
        measured, self._pending = self._pending, None
        if measured is not None:
            self._release(measured.held)
            gradient = measured.gradient
            if gradient is None:
                gated = self._gated()
                gradient = self._gradient(gated, {place: weight for place, _, weight in gated})
            if torch.isfinite(gradient).all():
                self._learn(gradient, lr)
        self.fold()

    def _gradient(
        self, gated: list[_Gated], kernels: Mapping[int, Tensor], scale: Tensor | float | None = None
    ) -> Tensor:
        """dL/dg of every class, float32, shape (classes,); NaN throughout if any kernel's is not finite.

        `kernels` are, by place, what the gradients were taken at.
        """
        counted = {
            place: column_products(weight.grad, kernels[place], dim).to(self.alpha)
            for place, dim, weight in gated
            if weight.grad is not None
        }
        none = self.alpha.new_zeros(max(map(len, self.channel_map.classes.values()), default=0))
        sums = [counted.get(place, none[:length]) for place, length in enumerate(self._lengths)]
        total = segment_sum(torch.cat([none[:0], *sums]), self._labels, self.channel_map.size + 1)
        if scale is not None:
            total = total / scale
        gradient = torch.where(self.live, total[:-1] / self.folded, 0.0)
        return torch.where(torch.isfinite(total).all(), gradient, torch.nan)

    def _learn(self, gradient: Tensor, lr: float) -> None:
        count, pressure = self._memory()
        count += 1
        share, price = self._stand()
        pressure = steer(self.budget, pressure, share, count)
        rate = ALPHA_RATE * lr
        target = self._gradient_step(gradient, rate)
        if pressure.movement > 0:
            alpha, deaths_settle = self._threshold(target, price, pressure.movement, count)
            pressure = Pressure(pressure.movement, pressure.integral, deaths_settle)
        else:
            alpha = _away_from_zero(target, OPEN_ALPHA)
        self.alpha.copy_(torch.where(self.live, alpha, 0.0))
        self.epsilon.fill_(epsilon_at(count, self.budget.steps))
        self.step_count.fill_(count)
        self.balance.fill_(pressure.movement / rate if rate else 0.0)
        self.integral.fill_(pressure.integral)
        self.settled.fill_(pressure.settled)
        self._read = (self._memory_version(), (count, pressure))

    def _gradient_step(self, gradient: Tensor, rate: float) -> Tensor:
        """Alpha after its bounded gradient step, which neither crosses zero nor comes to it.

        Near alpha = sqrt(epsilon / 3) the gate's slope is 0.65 / sqrt(epsilon), without limit as epsilon
        falls: unbounded steps leap over zero and open a gate that was about to close.
        """
        bound = self.budget.step_bound
        slope = gate_slope(self.alpha, self.epsilon)
        moved = self.alpha - torch.clamp(rate * gradient * slope, -bound, bound)
        sign = torch.sign(self.alpha)
        nearest = torch.clamp(self.alpha.abs(), max=OPEN_ALPHA)
        return sign * torch.maximum(sign * moved, nearest)

    def _threshold(self, target: Tensor, price: Tensor, movement: float, count: int) -> tuple[Tensor, bool]:
        """Equation 9 under the budget: alpha after it, and whether the target is given up as met."""
        shrunk = soft_threshold(target, shrinkage(price, movement, self.budget.step_bound))
        candidates = self.live & (shrunk == 0)
        alpha = _away_from_zero(torch.where(candidates, target, shrunk), LEAST_ALPHA)
        if not candidates.any():
            return alpha, False
        deaths = self._selection.deaths(target.abs().cpu(), candidates.cpu(), self.live.cpu(), count)
        return alpha.index_fill_(0, deaths.classes.to(alpha.device), 0.0), deaths.settled

    def _take_note(self) -> None:
        """Sees to alphas set by hand before they enter the mathematics."""
        if self._folded_at is None or self._folded_at[0] != _version(self.alpha):
            self.fold()

    def _hold_back(self, gated: list[_Gated], kernels: Mapping[int, Tensor]) -> tuple[_HeldBack, ...]:
        closing = self.live & (self.folded < NEARLY_CLOSED)
        if not closing.any():
            return ()
        flat = self._spread(closing, False).cpu()
        part = self._spread((self.folded / NEARLY_CLOSED) ** 2, 1.0)
        held = []
        for place, dim, weight in gated:
            index = torch.nonzero(self._on_side(flat, place)).flatten()
            if len(index):
                through = self._on_side(part, place)[index.to(part.device)].to(weight)
                index = index.to(weight.device)
                held.append(_HeldBack(weight, dim, index, kernels[place].index_select(dim, index), through))
        return tuple(held)

    def _release(self, held: tuple[_HeldBack, ...]) -> None:
        for columns in held:
            weight = columns.weight
            after = weight.index_select(columns.dim, columns.index)
            part = along(columns.part, columns.dim, weight.ndim)
            weight.index_copy_(columns.dim, columns.index, torch.lerp(columns.before, after, part))

    def _stand(self) -> tuple[float, Tensor]:
        """The share of FLOPs left, and each class's price relative to the mean price of live classes."""
        version = _version(self.live), id(self.live)
        if self._standing is None or self._standing[0] != version:
            live = self.live.cpu()
            price = self.flops.price(live)
            mean = price[live].mean() if live.any() else price.new_ones(())
            relative = (price / mean.clamp(min=1e-12)).to(self.alpha)
            self._standing = (version, self.flops.share(live), relative)
        return self._standing[1], self._standing[2]

    def _memory_version(self) -> tuple[Any, ...]:
        buffers = (self.step_count, self.integral, self.settled)
        return tuple((id(buffer), _version(buffer)) for buffer in buffers)

    def _memory(self) -> tuple[int, Pressure]:
        """Steps taken and the controller's memory, as the buffers have them."""
        version = self._memory_version()
        if self._read is None or self._read[0] != version:
            values = torch.stack([self.step_count.double(), self.integral.double(), self.settled.double()])
            step, integral, settled = values.tolist()
            self._read = (version, (int(step), Pressure(0.0, integral, bool(settled))))
        return self._read[1]


def _away_from_zero(alpha: Tensor, least: float) -> Tensor:
    """Alpha with every magnitude below `least` raised to it; alpha has no zeros where it counts."""
    return torch.where(alpha.abs() < least, torch.copysign(alpha.new_tensor(least), alpha), alpha)


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version
