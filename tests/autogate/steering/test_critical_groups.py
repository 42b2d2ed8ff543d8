"""Critical groups: every path to an output passes through them."""

import timm
import torch
from torch import nn

from autogate.steering.critical_groups import critical_groups
from rewriters import analyse
from rewriters.labelling.channel_map import Side


def needed(model: nn.Module, *args: torch.Tensor) -> set[str]:
    """A kernel that makes each group that is needed."""
    channel_map = analyse(model.eval(), args).channel_map
    groups = channel_map.groups()
    found = critical_groups(channel_map, [group.classes for group in groups])
    makers = {kernel.output_side: kernel.module for kernel in channel_map.kernels}
    return {next(makers[side] for side in groups[number].sides if side in makers) for number in found}


def test_every_layer_of_a_chain_is_needed():
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2))
    assert needed(net, torch.randn(2, 4)) == {"0", "2"}


def test_a_branch_beside_a_trunk_is_not_needed():
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.head = nn.Linear(4, 8), nn.Linear(8, 2)
            self.inner, self.outer = nn.Linear(8, 6), nn.Linear(6, 8)
            self.gate, self.ungate = nn.Linear(8, 3), nn.Linear(3, 8)

        def forward(self, x):
            x = self.stem(x)
            x = x + self.outer(self.inner(x).relu())
            return self.head(x * self.ungate(self.gate(x).relu()).sigmoid())

    assert needed(Residual(), torch.randn(2, 4)) == {"stem"}


def test_what_a_second_output_needs_counts_too():
    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.trunk, self.a, self.out_a = nn.Linear(4, 8), nn.Linear(8, 6), nn.Linear(6, 2)
            self.b, self.out_b = nn.Linear(8, 5), nn.Linear(5, 2)

        def forward(self, x):
            x = self.trunk(x).relu()
            return self.out_a(self.a(x).relu()), self.out_b(self.b(x).relu())

    assert needed(Heads(), torch.randn(2, 4)) == {"trunk", "a", "b"}


def test_either_half_of_a_concatenation_is_enough():
    class Halves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right, self.out = nn.Linear(4, 3), nn.Linear(4, 5), nn.Linear(8, 2)

        def forward(self, x):
            return self.out(torch.cat([self.left(x), self.right(x)], 1).relu())

    assert needed(Halves(), torch.randn(2, 4)) == set()


def test_stages_of_a_resnet_are_needed_and_its_blocks_are_not():
    model = timm.create_model("resnet18", num_classes=4)
    channel_map = analyse(model.eval(), (torch.randn(2, 3, 64, 64),)).channel_map
    groups = channel_map.groups()
    found = [groups[number] for number in critical_groups(channel_map, [group.classes for group in groups])]
    sides = {side for group in found for side in group.sides}
    assert {Side(f"layer{stage}.1.conv2.weight", 0) for stage in (1, 2, 3, 4)} <= sides
    assert not any(side.tensor.endswith("conv1.weight") and side.tensor != "conv1.weight" and side.dim == 0
                   for side in sides)  # fmt: skip
