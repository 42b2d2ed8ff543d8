"""Let the forwards that take statistics along channels take them over the live ones, and take that back.

place(model, sites, number, undo_log)    # each call is made by a module of `live_statistics.py` from now on
write_live(model, channel_map, live)    # over these channels
take_off(model, undo_log)                # every module has the forward again that it had
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from rewriters.cross_channel.live_statistics import FORMS, FORMS_BY_PLACE, LiveStatistic
from rewriters.errors import TraceError
from rewriters.forwards import LiveForward, keep_layers_apart
from rewriters.labelling import ALWAYS, ChannelMap, Statistic
from rewriters.labelling.rules import Look
from rewriters.undo_log import UndoLog


@dataclass(frozen=True, eq=False)
class Site:
    """A module whose own forward takes statistics along channels that may die.

    Attributes:
        path: the module.
        graphs: its forward, traced in eval mode (False) and train mode (True).
        looks: the statistics, in the order they are taken.
        names: names of the children that can stand in for them.
    """

    path: str
    graphs: Mapping[bool, fx.Graph]
    looks: tuple[Look, ...]
    names: tuple[str, ...]

    def child(self, index: int) -> str:
        return f"{self.path}.{self.names[index]}".lstrip(".")

    def mortal(self, number: np.ndarray) -> list[int]:
        """Which of the statistics look at channels that may die, `number` being the class of each label."""
        return [i for i, look in enumerate(self.looks) if (number[look.labels.numpy()] != ALWAYS).any()]


def site(module: nn.Module, path: str, graphs: Mapping[bool, fx.Graph], recorded: int) -> Site:
    """The statistics in a module's traced forward, which has to hold as many as were recorded.

    Raises:
        TraceError: a statistic is taken by a call that has no form over live channels, or where tracing
            doesn't see it.
    """
    unlike = list(dict.fromkeys(graphs.values()))
    looks = [[look for node in _looking(graph) for look in node.meta["looks"]] for graph in unlike]
    for graph in unlike:
        for node in _looking(graph):
            if len(node.meta["looks"]) > 1 or node.target not in _forms(node.meta["looks"][0]):
                raise TraceError(f"{node.format_node()} has no form for live channels", where=path)
    first, targets = looks[0], [[node.target for node in _looking(graph)] for graph in unlike]
    alike = all(_alike(first, other) for other in looks) and all(other == targets[0] for other in targets)
    if len(first) != recorded or not alike:
        raise TraceError("traced, it takes other statistics than it took", where=path)
    names = (f"live_statistic_{number}" if number else "live_statistic" for number in itertools.count())
    free = itertools.islice((name for name in names if not hasattr(module, name)), len(first))
    return Site(path, graphs, tuple(first), tuple(free))


def _forms(look: Look) -> Mapping[Any, Callable[[int, int, Tensor], LiveStatistic]]:
    return FORMS_BY_PLACE if look.places else FORMS


def _looking(graph: fx.Graph) -> list[fx.Node]:
    return [node for node in graph.nodes if node.meta.get("looks")]


def _alike(first: Sequence[Look], second: Sequence[Look]) -> bool:
    pairs = list(zip(first, second, strict=False))
    return len(first) == len(second) and all(
        a.dim == b.dim and a.labels.shape == b.labels.shape and a.places == b.places for a, b in pairs
    )


def statistics(sites: Sequence[Site], number: np.ndarray) -> tuple[Statistic, ...]:
    """What looks at channels that may die, `number` being the class of each label."""
    return tuple(
        Statistic(one.child(index), torch.from_numpy(number[one.looks[index].labels.numpy()].astype(np.int64)))
        for one in sites
        for index in one.mortal(number)
    )


def place(model: nn.Module, sites: Sequence[Site], number: np.ndarray, undo_log: UndoLog) -> None:
    """Let statistics that look at channels that may die be taken over the live ones: all until `write_live`.

    Args:
        model: changed in place, every change noted in `undo_log`.
        sites: where statistics are taken.
        number: class of each label.
    """
    mortals = [(one, mortal) for one in sites if (mortal := one.mortal(number))]
    if mortals:
        keep_layers_apart(model, undo_log)
    for one, mortal in mortals:
        module = model.get_submodule(one.path)
        made = {graph: _with_children(graph, one, mortal) for graph in one.graphs.values()}
        graphs = {training: made[graph] for training, graph in one.graphs.items()}
        forward = LiveForward(module, graphs, tuple(one.names[index] for index in mortal))
        nodes = _looking(one.graphs[False])
        for index in mortal:
            look, node = one.looks[index], nodes[index]
            form = _forms(look)[node.target](len(look.labels), look.dim, _like(module, node))
            undo_log.set(module._modules, one.names[index], form.train(module.training))
        undo_log.set_attribute(module, "forward", forward)


def _like(module: nn.Module, node: fx.Node) -> Tensor:
    """A tensor on the device, and of the type, that the module computes with."""
    value = next((arg.meta["val"] for arg in node.all_input_nodes if isinstance(arg.meta["val"], Tensor)), None)
    assert value is not None  # a statistic is taken of a tensor
    return torch.empty(0, dtype=value.dtype, device=value.device)


def _with_children(graph: fx.Graph, one: Site, indices: Sequence[int]) -> fx.Graph:
    copied = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    copied.output(copied.graph_copy(graph, copies))
    looking = _looking(graph)
    for index in indices:
        node = copies[looking[index]]
        with copied.inserting_before(node):
            call = copied.call_module(one.names[index], node.args, dict(node.kwargs))
        node.replace_all_uses_with(call)
        copied.erase_node(node)
    return copied


def write_live(model: nn.Module, channel_map: ChannelMap, live: Tensor) -> None:
    """Let statistics be taken over the classes in `live` (bool, shape (classes,)), if they are in place."""
    seen = torch.cat([channel_map.looked_at(live.cpu()), torch.ones(1, dtype=torch.bool)])
    for statistic in channel_map.statistics:
        form: Any = model.get_submodule(statistic.path)
        form.write(seen[statistic.classes])


def take_off(model: nn.Module, undo_log: UndoLog) -> None:
    """Give every module the forward back that takes its statistics over all channels."""
    for module in list(model.modules()):
        forward = module.__dict__.get("forward")
        if isinstance(forward, LiveForward):
            if forward.plain is None:
                undo_log.remove(module.__dict__, "forward")
            else:
                undo_log.set_attribute(module, "forward", forward.plain)
            for name in forward.names:
                undo_log.remove(module._modules, name)


@contextlib.contextmanager
def plain_statistics(model: nn.Module) -> Iterator[None]:
    """Inside, statistics are taken over all channels."""
    undo_log = UndoLog()
    take_off(model, undo_log)
    try:
        yield
    finally:
        undo_log.undo()
