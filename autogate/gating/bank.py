"""The gate bank: stores the gates of a model, one for each class of channels.

A gate multiplies an input channel of a convolution or linear layer. Multiplying the kernel along its input dimension
is the same function. So gates are stored *in* the kernels: the weight of a gated model is V = W g at all times, where W
is the kernel that plain training would see. Forward and backward are those of the plain model. The gradient of a gate
can be read from V's,

    dL/dg_i = <dL/dV[.., i], V[.., i]> / g_i, summed over all sides that carry class i,

and when a gate has moved, its columns are multiplied by the ratio of the new gate to the old.

The bank stores (this file, `state.py`). `stepping.py` takes the gates' step, `folding.py` brings the kernels in line,
`hooks.py` lets optimizers call both.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from autogate.budget import Targets
from autogate.gating import hooks
from autogate.gating.first_steps import looks_untrained
from autogate.gating.folding import Folding
from autogate.gating.kernels import GatedKernels
from autogate.gating.progress import Progress
from autogate.gating.state import BankBuffers
from autogate.gating.stepping import Stepping
from autogate.gating.watch import Watch
from autogate.methods import KernelSums, Learner
from autogate.steering import Schedule
from rewriters import ChannelMap, Side

BANK = "autogate"
"""Name of the submodule that holds the gates while they train."""


class GateBank(BankBuffers):
    """One gate for each class of channels of a model, learned towards a budget.

    The bank is a submodule of the model that it gates. All that training changes is in buffers, so that state_dict,
    checkpoints, EMA copies and device moves include it. The gated kernels stay plain parameters under their own names.
    All buffers have floating-point types, and the average of several states is meaningful: what is dead in the model is
    dead in its average.

    To close classes by hand, set `bank.alpha[classes] = 0` under `torch.no_grad()`. The model's next forward zeroes
    their columns; a forward that is compiled, or captured in a CUDA graph, needs `bank.fold()` first. A dead class
    stays dead.

    Building a bank changes no number of the model: the initial gates count as folded into the kernels.

    Args:
        model: the model that `channel_map` describes.
        channel_map: its classes of channels.
        learner: the mathematics of a step: the targets, the method, the length of the run.
        origin: what the caller needs again at the end; stored as it is.
        added: weights of layers that were not in the user's model.
        follows: the bank follows optimizer steps by itself. If False, `step` must be called after each, and the bank
            keeps a copy of the gated kernels: the gradients belong to these, and by then the optimizer has moved the
            kernels.

    Attributes:
        learner: as given.
        alpha: float32, shape (classes,): learnable gate parameters, 1 at first.
        folded: float32, shape (classes,): the gates that the kernels hold now.
        dead: float32, shape (classes,): above 0 for dead classes, larger for later ones; averages mean something.
        step_count: 0-dim float64, steps taken.
        balance: 0-dim float64, lambda of the latest step.
        integral: 0-dim float64, the controller's memory.
        settled: 0-dim float64, above 0 once no more classes die: the targets are met, or the steps are over.
        peak: 0-dim float64, the largest learning rate of the kernels so far.
        layout: 0-dim float64, a checksum of which channels each class has. Gates of a checkpoint load only where it is
            the same.
        epsilon, sensitivity: the state of the method, here of GDP (see `autogate.methods.GDP`).

    Raises:
        AutogateError: a gated kernel is not a parameter of the model.
    """

    origin: Any

    def __init__(
        self, model: nn.Module, channel_map: ChannelMap, learner: Learner, origin: Any = None,
        added: Collection[str] = (), follows: bool = True,
    ):  # fmt: skip
        super().__init__()
        self.follows = follows
        self.channel_map = channel_map
        self.added = frozenset(added)
        self.learner = learner
        self.origin = origin
        self.register(self.learner.start, self.learner.method, channel_map.checksum())
        self._kernels = GatedKernels(model, channel_map, self.learner.method.scales_all)
        self._folding = Folding(self._kernels, channel_map, self.learner.method, self.state(), keeps=not follows)
        self._stepping = Stepping(self._kernels, self._folding, self.learner)
        self._watch = Watch(self._kernels, self._stepping, self.added, looks_untrained(model))
        self.to(next(iter(self.kernels()), self.alpha).device)
        self.hook = model.register_forward_pre_hook(self._before_forward)
        if follows:
            hooks.register(self)
        else:
            self._kernels.keep(self._kernels.find(self.alpha.device).sides)

    @property
    def targets(self) -> Targets:
        """What is to be left."""
        return self.learner.targets

    @property
    def schedule(self) -> Schedule:
        """The course of the run."""
        return self.learner.schedule

    def _forget(self) -> None:
        """Drop all that was worked out from buffers and kernels."""
        self._kernels.forget()
        self._folding.forget()
        self._stepping.forget()

    def _loaded(self) -> None:
        self._folding.write_live(self.dead)
        self._watch.loaded()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if self.follows:
            hooks.register(self)

    def detach(self) -> None:
        """End the bank's life: no optimizer step and no forward reaches it any more."""
        hooks.unregister(self)
        self.hook.remove()

    @property
    def stands_still(self) -> bool:
        """Whether gates no longer move: the run is over, or the targets are met and live gates are open."""
        return self._stepping.is_over(self.state())

    @property
    def live(self) -> Tensor:
        """The classes that live, bool, shape (classes,). Those whose alpha is zero don't, folded or not."""
        return self.gates() != 0

    def gates(self) -> Tensor:
        """The gates g(alpha), float32, shape (classes,); zero for dead classes."""
        state = self.state()
        return torch.where(state.live, self.learner.method.factor(state.alpha, state.method), 0.0)

    def shares(self) -> dict[str, float]:
        """The share that is left of each resource in the budget, by its name, all dead classes removed.

        Alphas that were set to zero by hand count before they are folded.
        """
        return self.targets.shares(self.live.cpu())

    def where(self, label: int) -> list[tuple[Side, int]]:
        """The (side, index) pairs that are removed when class `label` dies."""
        return self.channel_map.where(label)

    def describe(self, labels: Iterable[int]) -> str:
        """Which channels these classes have, for a reader: `conv2.weight[1] at 3, 5; fc.weight[1] at 7`."""
        return self.channel_map.describe(labels)

    def progress(self) -> Progress:
        """Where the run is, as plain numbers. Alphas that were set to zero by hand count before they are folded."""
        state, live = self.state(), self.live.cpu()
        counters = self._stepping.counters(state)
        return Progress(
            shares=self.targets.shares(live),
            targets=self.targets.wanted(),
            step=counters.steps,
            steps=self.schedule.steps,
            balance=float(state.balance),
            method_state={name: float(value) for name, value in state.method.items() if value.ndim == 0},
            classes=self.channel_map.size,
            dead=int((~live).sum()),
            settled=counters.settled or self.learner.standing(live).distance <= 0,
        )

    def __repr__(self) -> str:
        now = self.progress()
        shares = ", ".join(f"{name} {share:.3f} -> {now.targets[name]:.3f}" for name, share in now.shares.items())
        return f"GateBank({now.classes} classes, {now.dead} dead, {shares}, step {now.step} of {now.steps})"

    def forward(self, x: Any = None) -> Any:
        """Returns x: gates act from within the kernels. A gated `Sequential` calls its bank too."""
        return x

    def kernels(self) -> list[nn.Parameter]:
        """The gated kernels, each once."""
        return list(self._kernels.find(self.alpha.device).kernels)

    def parameters_of_model(self) -> list[nn.Parameter]:
        """All parameters of the model."""
        return self._kernels.parameters()

    def about_to_step(self, optimizer: Optimizer) -> None:
        """Called before each step of an optimizer that trains some of the model: warns in the first steps."""
        self._watch.before(self.state(), optimizer)

    @torch.no_grad()
    def fold(self, stepped: bool = False) -> None:
        """Bring the kernels in line with alpha; cheap if nothing has changed since the last time.

        Classes with zero alpha die. The columns of dead classes become exactly zero, whatever has moved them. The
        columns of the others are multiplied by the ratio of their gate to the one folded before. If not only alpha was
        written to, but also `folded` and the method's state (in an average of the model, by a checkpoint), the kernels
        are right as they are, and no column is scaled.

        Args:
            stepped: an optimizer has stepped. Some write to a kernel without a trace in its version counter: of a
                sharded kernel, in a CUDA graph, through `.data`.

        Raises:
            AutogateError: the alpha of a live class is not finite; nothing is folded then.
        """
        self._folding.fold(self.state(), stepped)

    @torch.no_grad()
    def close(self, classes: Tensor, settled: bool = False) -> None:
        """Close gates now: these classes die, and their columns become exactly zero.

        Args:
            classes: their indices, int64, in the order in which they are to count as dead.
            settled: whether the model is now as close to its targets as its classes allow.
        """
        self.alpha.index_fill_(0, classes.to(self.alpha.device), 0.0)
        self.settled.clamp_(min=float(settled))
        self.fold()
        self.dead[classes] += torch.arange(len(classes)).to(self.dead)

    def kernel_sums(self) -> KernelSums:
        """Sums over the columns of each class, on all its gated kernels, and over their gradients."""
        return self._stepping.sums(self.state())

    def _before_forward(self, module: nn.Module, args: Any) -> None:
        if not (torch.compiler.is_compiling() or hooks.is_capturing()):
            self._watch.processes.forward()
            if self._folding.wanted(self.state()):
                self.fold()

    @torch.no_grad()
    def measure(self, *, scale: Tensor | float | None = None, later: bool = False) -> None:
        """Read what the method needs from kernels and gradients. Call it before the optimizer moves the kernels.

        Columns of nearly closed gates are held back: `step` lets only a part of the optimizer's change to them take
        effect (see `GDP.let_through`).

        Args:
            scale: what the gradients are still multiplied by (a GradScaler's scale), if anything.
            later: a closure computes the gradients within the optimizer's step: call `read` after it.
        """
        self._stepping.measure(self.state(), scale, later)

    @torch.no_grad()
    def read(self) -> None:
        """Read the gradients that a closure has computed, before the optimizer uses them."""
        self._stepping.read(self.state())

    def discard(self) -> None:
        """Drop what `measure` has read: the optimizer is about to skip its step."""
        self._stepping.pending = None

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """The gates' step, after the optimizer's own: move the gates, then fold them.

        A bank that follows optimizers has `measure` and this called by their steps (see `hooks.py`). One that doesn't
        measures now, on its copy of the kernels.

        If a gradient is not finite, nothing moves and the step doesn't count. Nor does a step without gradient and
        learning rate, which torch.distributed.checkpoint takes to create an optimizer's state. Once the targets are met
        and live gates are open, or the budget's steps are over, alpha stays as it is and nothing is read from
        gradients. In every case the dead columns are exactly zero afterwards. Weights that are not finite are warned
        of, once.

        Raises:
            AutogateError: alpha is not finite; or processes of DistributedDataParallel have other gates than others.

        Args:
            lr: the kernels' learning rate; alpha's follows it (see `GDP.alpha_rate`).
        """
        if not self.follows:
            self._watch.before(self.state(), None)
        finite = self._stepping.step(self.state(), lr)
        self.fold(stepped=True)
        self._watch.after(self.state(), finite)
