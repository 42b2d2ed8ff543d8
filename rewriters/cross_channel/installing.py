"""Install modules that take statistics over the live channels, and remove them.

install_live_statistics(model, sites, class_of, undo_log)  # a module of `live_statistics.py` now makes each call
write_live(model, channel_map, live)                       # over these channels
remove_live_statistics(model, undo_log)                    # every module has its own forward again
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

from rewriters.cross_channel.live_statistics import FORMS, ZEROS_ADD_NOTHING, LiveOperand, LiveStatistic
from rewriters.errors import TraceError
from rewriters.forwards import Graphs, LiveForward, call_name, disable_fused_layers, set_forward
from rewriters.labelling import ALWAYS, ChannelMap, Statistic
from rewriters.labelling.rules import LabelledStatistic
from rewriters.recording import modules_of
from rewriters.undo_log import UndoLog


@dataclass(frozen=True, eq=False)
class StatisticSite:
    """A module whose own forward takes statistics across channels that can be removed.

    Attributes:
        path: the module.
        ways: its forward, traced in eval mode (False) and train mode (True), for each way in which it is called.
        statistics: the statistics of all ways, in the order in which they are taken.
        names: names of the children that can take them instead.
    """

    path: str
    ways: tuple[Mapping[bool, fx.Graph], ...]
    statistics: tuple[LabelledStatistic, ...]
    names: tuple[str, ...]

    @property
    def graphs(self) -> Graphs:
        """The traced forwards of each mode."""
        return {mode: tuple(way[mode] for way in self.ways if mode in way) for mode in (False, True)}

    def child(self, index: int) -> str:
        return f"{self.path}.{self.names[index]}".lstrip(".")

    def removable(self, class_of: np.ndarray) -> list[int]:
        """Which of the statistics include channels that can be removed; `class_of` is the class of each label."""
        return [
            i for i, statistic in enumerate(self.statistics) if (class_of[statistic.labels.numpy()] != ALWAYS).any()
        ]


def find_statistics(
    module: nn.Module, path: str, ways: Sequence[Mapping[bool, fx.Graph]], recorded: Sequence[int]
) -> StatisticSite:
    """The statistics in a module's forward, which was traced for each way in which it is called.

    Each trace has to hold as many as were recorded.

    Raises:
        TraceError: a statistic is taken by a call that has no form over live channels, or where the trace doesn't see
            it.
    """
    found = [
        statistic
        for graphs, count in zip(ways, recorded, strict=True)
        for statistic in _statistics_of(path, graphs, count)
    ]
    names = (f"live_statistic_{number}" if number else "live_statistic" for number in itertools.count())
    free = itertools.islice((name for name in names if not hasattr(module, name)), len(found))
    return StatisticSite(path, tuple(ways), tuple(found), tuple(free))


def _statistics_of(path: str, graphs: Mapping[bool, fx.Graph], recorded: int) -> list[LabelledStatistic]:
    """The statistics in both modes of one trace. Raises `TraceError`."""
    distinct = [_taken(graph) for graph in dict.fromkeys(graphs.values())]
    for node, statistic in (one for taken in distinct for one in taken):
        if _form(node, statistic) is None:
            raise TraceError(f"{call_name(node)} has no form for live channels", where=path)
    first = [statistic for _, statistic in distinct[0]]
    targets = [[node.target for node, _ in taken] for taken in distinct]
    alike = all(_alike(first, [statistic for _, statistic in taken]) for taken in distinct)
    alike = alike and all(other == targets[0] for other in targets)
    if len(first) != recorded or not alike:
        raise TraceError("traced, it takes other statistics than it took when it was recorded", where=path)
    return first


def take_alike(site: StatisticSite, other: StatisticSite) -> bool:
    """Whether two calls take their statistics by the same functions along the same dimensions."""
    return _alike(site.statistics, other.statistics) and _taken_by(site) == _taken_by(other)


def _taken_by(site: StatisticSite) -> list[Any]:
    return [node.target for way in site.ways for node, _ in _taken(next(iter(way.values())))]


def _form(node: fx.Node, statistic: LabelledStatistic) -> Callable[[int, int, Tensor], LiveStatistic] | None:
    """The module that takes one of a call's statistics over the live channels, or None."""
    if node.target in ZEROS_ADD_NOTHING:
        return LiveOperand if statistic.operands else None
    return None if len(node.meta["statistics"]) > 1 or statistic.by_position else FORMS.get(node.target)


def _taken(graph: fx.Graph) -> list[tuple[fx.Node, LabelledStatistic]]:
    """The statistics in a graph, each with the call that takes it."""
    return [(node, statistic) for node in graph.nodes for statistic in node.meta.get("statistics", ())]


def _alike(first: Sequence[LabelledStatistic], second: Sequence[LabelledStatistic]) -> bool:
    pairs = list(zip(first, second, strict=False))
    return len(first) == len(second) and all(
        a.dim == b.dim and a.labels.shape == b.labels.shape and a.by_position == b.by_position for a, b in pairs
    )


def gather_statistics(sites: Sequence[StatisticSite], class_of: np.ndarray) -> tuple[Statistic, ...]:
    """The statistics that include channels which can be removed; `class_of` is the class of each label."""
    return tuple(
        Statistic(one.child(index), torch.from_numpy(class_of[one.statistics[index].labels.numpy()].astype(np.int64)))
        for one in sites
        for index in one.removable(class_of)
    )


def install_live_statistics(
    model: nn.Module, sites: Sequence[StatisticSite], class_of: np.ndarray, undo_log: UndoLog
) -> None:
    """Take statistics across channels that can be removed over the live ones: all of them until `write_live`.

    Each statistic is taken by a small child module instead of the call.

    Args:
        model: changed in place.
        sites: where statistics are taken.
        class_of: class of each label.
        undo_log: notes every change.
    """
    found = [(one, removable) for one in sites if (removable := one.removable(class_of))]
    if found:
        disable_fused_layers(model, undo_log)
    for one, removable in found:
        module = model.get_submodule(one.path)
        graphs = _with_children(one, removable)
        forward = LiveForward(module, graphs, one.path, tuple(one.names[index] for index in removable))
        nodes = [node for way in one.ways for node, _ in _taken(next(iter(way.values())))]
        for index in removable:
            statistic, node = one.statistics[index], nodes[index]
            form = _form(node, statistic)
            assert form is not None  # `find_statistics` has seen to that
            child = form(len(statistic.labels), statistic.dim, _like(node))
            undo_log.set(module._modules, one.names[index], child.train(module.training))
        set_forward(module, forward, undo_log)


def _like(node: fx.Node) -> Tensor:
    """An empty tensor with the device and dtype that a call computes with."""
    value = next((arg.meta["val"] for arg in node.all_input_nodes if isinstance(arg.meta["val"], Tensor)), None)
    assert value is not None  # a statistic has a tensor among its arguments
    return torch.empty(0, dtype=value.dtype, device=value.device)


def _with_children(one: StatisticSite, indices: Sequence[int]) -> Graphs:
    """Copies of the graphs in which children take these of the statistics."""
    made: dict[bool, list[fx.Graph]] = {False: [], True: []}
    names = iter([name if index in indices else None for index, name in enumerate(one.names)])
    for way in one.ways:
        own = list(itertools.islice(names, len(_taken(next(iter(way.values()))))))
        copies = {graph: _with_calls(graph, own) for graph in dict.fromkeys(way.values())}
        for mode, graph in way.items():
            made[mode].append(copies[graph])
    return made


def _with_calls(graph: fx.Graph, names: Sequence[str | None]) -> fx.Graph:
    """A copy in which children with these names take the statistics; None leaves a statistic as it is."""
    copied = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    copied.output(copied.graph_copy(graph, copies))
    for (taking, statistic), name in zip(_taken(graph), names, strict=True):
        node = copies[taking]
        if name is None:
            continue
        with copied.inserting_before(node):
            if taking.target in ZEROS_ADD_NOTHING:
                for operand in [node.all_input_nodes[index] for index in statistic.operands]:
                    node.replace_input_with(operand, copied.call_module(name, (operand,)))
            else:
                call = copied.call_module(name, node.args, dict(node.kwargs))
                node.replace_all_uses_with(call)
                copied.erase_node(node)
    return copied


def write_live(model: nn.Module, channel_map: ChannelMap, live: Tensor) -> None:
    """Take the installed statistics over the classes in `live` (bool, shape (classes,))."""
    seen = torch.cat([channel_map.looked_at(live.cpu()), torch.ones(1, dtype=torch.bool)])
    for statistic in channel_map.statistics:
        form: Any = model.get_submodule(statistic.path)
        form.write(seen[statistic.classes])


def remove_live_statistics(model: nn.Module, undo_log: UndoLog) -> None:
    """Restore every module's forward that takes its statistics over all channels."""
    for module in modules_of(model):
        forward = module.__dict__.get("forward")
        if isinstance(forward, LiveForward):
            set_forward(module, forward.plain, undo_log)
            for name in forward.names:
                undo_log.remove(module._modules, name)


@contextlib.contextmanager
def plain_statistics(model: nn.Module) -> Iterator[None]:
    """Inside, statistics are taken over all channels, as before any module was installed."""
    undo_log = UndoLog()
    remove_live_statistics(model, undo_log)
    try:
        yield
    finally:
        undo_log.undo()
