"""Containers and objects of the user's own classes: what a rewritten forward gives and takes stays of its class."""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from rewriters import CaptureError
from rewriters.outputs import run_eval
from tests.rewriters.blocks.idioms import Output
from tests.rewriters.exactness import assert_exact, slim
from tests.rewriters.helpers import Net, analysed, conv, image, is_pinned


class Pair(NamedTuple):
    first: Tensor
    second: Tensor


@dataclass
class Scored:
    first: Tensor
    second: Tensor


class Entries(list):
    """A list of the user's own class."""


class Places(tuple):
    """A tuple of the user's own class."""


class Held:
    """An object, not a container."""

    def __init__(self, first: Tensor, second: Tensor):
        self.first, self.deeper = first, [{"second": second}]


class Slots:
    """An object without a dictionary, which holds itself."""

    __slots__ = ("first", "itself", "second")

    def __init__(self, first: Tensor, second: Tensor):
        self.first, self.second, self.itself = first, second, self


def by_default(first: Tensor, second: Tensor) -> defaultdict[str, Tensor]:
    made: defaultdict[str, Tensor] = defaultdict(lambda: torch.zeros(1), first=first)
    made["second"] = second
    return made


CONTAINERS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "named tuple": Pair,
    "dataclass": Scored,
    "OrderedDict": lambda first, second: OrderedDict(first=first, second=second),
    "defaultdict": by_default,
    "dict with attributes": lambda first, second: Output(first=first, second=second),
    "list": lambda first, second: Entries([first, second]),
    "tuple": lambda first, second: Places([first, second]),
}


def both(container: Any) -> tuple[Tensor, Tensor]:
    """What one of these containers holds."""
    if isinstance(container, (Entries, Places)):
        return container[0], container[1]
    if type(container) in (OrderedDict, defaultdict):
        return container["first"], container["second"]
    return container.first, container.second


class Giving(nn.Module):
    """Gives what it computed in a container."""

    def __init__(self, container: Callable[[Tensor, Tensor], Any]):
        super().__init__()
        self.a, self.b, self.container = conv(3, 8), conv(8, 6), container

    def forward(self, x):
        first, second = self.a(x).split([4, 4], 1)
        y = self.b(torch.cat([second, first], 1))
        return self.container(y.relu(), y.mean((2, 3), keepdim=True))


@pytest.mark.parametrize("container", CONTAINERS.values(), ids=CONTAINERS)
def test_what_a_forward_gives_in_a_container(container):
    def forward(m, x):
        first, second = both(m.giving(x))
        return m.c(first * second)

    model = Net(forward, giving=Giving(container), c=conv(6, 2)).double()
    assert assert_exact(model, (image().double(),)).analysis.channel_map.size == 8 + 6
    slimmed = slim(model, (image().double(),))
    given = slimmed.model.giving(image().double())
    assert "giving" in slimmed.plan.forwards and type(given) is type(container(given, given))
    if isinstance(given, defaultdict):
        assert torch.equal(given["nothing"], torch.zeros(1))


class Taking(nn.Module):
    """Takes a container apart in a forward that has to be rewritten."""

    def __init__(self):
        super().__init__()
        self.c = conv(8, 6)

    def forward(self, given):
        first, second = both(given)
        return self.c(torch.cat([second, first.view(len(first), 4, *first.shape[2:])], 1))


@pytest.mark.parametrize("container", CONTAINERS.values(), ids=CONTAINERS)
def test_what_a_forward_takes_from_a_container(container):
    def forward(m, x):
        return m.d(m.taking(container(m.a(x), m.b(x))))

    model = Net(forward, a=conv(3, 4), b=conv(3, 4), taking=Taking(), d=conv(6, 2)).double()
    assert_exact(model, (image().double(),))


OBJECTS = {**CONTAINERS, "object": Held, "slots": Slots, "set": lambda *both: {*both}}


@pytest.mark.parametrize("container", OBJECTS.values(), ids=OBJECTS)
def test_what_the_model_returns_keeps_its_channels_whatever_holds_it(container):
    """They would go with what another layer reads of them, and nothing would compare them."""

    def forward(m, x):
        y = m.a(x)
        return container(m.b(m.c(y).relu()), y)

    found = analysed(forward, a=conv(3, 8), b=conv(8, 4), c=conv(8, 8))
    assert is_pinned(found.channel_map, "a.weight", 0) and not is_pinned(found.channel_map, "c.weight", 0)
    model = Net(forward, a=conv(3, 8), b=conv(8, 4), c=conv(8, 8))
    assert sorted(len(tensor[0]) for tensor in run_eval(model, (image(),))) == [4, 8]


@pytest.mark.parametrize("container", [*CONTAINERS, "slots"])
def test_the_values_of_what_comes_in_a_container_are_not_known(container):
    """They would decide for all inputs which way the forward takes."""

    def forward(m, given):
        x = both(given)[0]
        return m.b(m.a(x / 255 if x.max() > 1 else x))

    with pytest.raises(CaptureError, match="the forward depends on the values of a tensor"):
        analysed(forward, OBJECTS[container](image(), image()), a=conv(3, 8), b=conv(8, 4))


@pytest.mark.parametrize("returned", [iter, lambda tensors: None])
def test_a_model_that_returns_no_tensor_is_refused(returned):
    with pytest.raises(CaptureError, match="no tensors are found in what it returns, of type"):
        analysed(lambda m, x: returned([m.b(m.a(x))]), a=conv(3, 8), b=conv(8, 4))
