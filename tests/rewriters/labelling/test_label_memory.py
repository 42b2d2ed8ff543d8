"""The analysis holds labels, not a number for every pixel."""

from __future__ import annotations

import tracemalloc

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rewriters.analysis.analyse import analyse
from rewriters.labelling.channel_map import Side
from rewriters.labelling.labels import LabelSpace
from rewriters.labelling.propagate import Labelling
from rewriters.slimming.dry_run import dry_run
from tests.rewriters.cross_channel.test_derived_kernels import Standardised
from tests.rewriters.exactness import assert_exact
from tests.rewriters.helpers import Net, conv

SIDE = 16


class Largest(TorchDispatchMode):
    """Elements of the largest tensor with data that is made."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and not isinstance(leaf, FakeTensor) and leaf.device.type == "cpu":
                held = leaf.untyped_storage().nbytes() // leaf.element_size()
                self.elements = max(self.elements, min(held, leaf.numel()))
        return out


def bias(m: Net, x: Tensor) -> Tensor:
    """Heads' scores with a bias for each pair of pixels, picked from a table."""
    rows = m.a(x).flatten(2).unflatten(1, (4, 2))
    scores = rows.transpose(2, 3) @ rows
    scores = scores + m.table[m.places].permute(2, 0, 1)
    return m.b((rows @ scores).flatten(1, 2).unflatten(2, x.shape[2:]))


FORWARDS = {
    "roll": lambda m, x: m.b(m.a(x).roll((1, 2), (2, 3))),
    "concatenation": lambda m, x: m.b(torch.cat([m.a(x), m.a(x)], 2)),
    "concatenation of channels": lambda m, x: m.c(torch.cat([m.a(x).chunk(2, 1)[0], m.a(x)], 1)),
    "reshape with a copy": lambda m, x: m.b(m.a(x).transpose(2, 3).reshape(2, 4, 2, -1).reshape(2, 8, SIDE, SIDE)),
    "picked rows": bias,
}


@pytest.mark.parametrize("forward", FORWARDS.values(), ids=FORWARDS.keys())
def test_no_tensor_is_as_large_as_what_goes_through_a_layer(forward):
    x = torch.randn(2, 3, SIDE, SIDE)
    model = Net(forward, a=conv(3, 8), b=conv(8, 2), c=conv(12, 2), table=nn.Parameter(torch.randn(16, 4)))
    model.register_buffer("places", torch.randint(16, (SIDE**2, SIDE**2)))
    with Largest() as largest:
        analysis = dry_run(model.eval(), analyse(model, (x,)), (x,))
    assert analysis.channel_map.size
    assert 0 < largest.elements < 2 * 8 * SIDE**2 / 2
    assert_exact(model.double(), (x.double(),))


def test_no_tensor_is_as_large_as_a_kernel_that_is_reshaped():
    layers = nn.Sequential(conv(3, 32), Standardised(32, 32, 3, padding=1), Standardised(32, 32, 3), conv(32, 2)).eval()
    x = torch.randn(2, 3, 6, 6)
    with Largest() as largest:
        analysis = dry_run(layers, analyse(layers, (x,)), (x,))
    assert analysis.channel_map.size == 3 * 32
    assert 0 < largest.elements < 32 * 32 * 9 / 2


def test_labels_are_joined_a_part_at_a_time():
    """Kernels that lie flattened in one dimension (CondConv's) have a label for each element."""
    half = 2**20
    space = LabelSpace()
    labels = space.fresh(2 * half)
    space.merge(labels[:half], labels[half:])
    tracemalloc.start()
    try:
        roots = space.roots()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (roots[:half] == roots[half:]).all() and (roots[:half] == labels[:half].numpy()).all()
    assert peak < 3 * roots.nbytes


def test_classes_are_numbered_once_for_what_is_known():
    labelling = Labelling()
    kernel = labelling.space.own("a.weight", (4, 3))
    labelling.findings.gated.add(Side("a.weight", 1))
    first = labelling.class_of_label()
    assert first.tolist() == [-1] * 4 + [0, 1, 2] and labelling.class_of_label() is first
    labelling.findings.gated.add(Side("a.weight", 0))
    assert labelling.class_of_label().tolist() == [0, 1, 2, 3, 4, 5, 6]
    labelling.space.merge(kernel.layers[1].flatten(), kernel.layers[0].flatten()[:3])
    assert labelling.class_of_label().tolist() == [0, 1, 2, 3, 0, 1, 2]
    labelling.space.pin(kernel.layers[0][3:], "a", "op", "reason")
    assert labelling.class_of_label().tolist() == [0, 1, 2, -1, 0, 1, 2]
