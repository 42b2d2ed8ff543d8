"""The walks through a module tree find what PyTorch's own find, in the same order."""

import pytest
import torch
from torch import nn

from rewriters.recording import modules_of, named_modules, named_tensors


class Tree(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
        self.nothing = None
        self.absent = nn.Linear(4, 4, bias=False)
        self._modules["absent"] = None
        self.again = self.first[1]
        self.last = nn.Sequential(self.first, nn.Sequential(nn.Linear(4, 4), self.first[0]))
        self.last[1][0].weight = self.first[0].weight
        self.register_buffer("table", torch.zeros(2))
        self.register_buffer("none", None)


@pytest.mark.parametrize("model", [Tree(), nn.Linear(2, 2), torch.jit.script(nn.Sequential(nn.Linear(2, 2)))])
def test_modules_and_tensors_are_found_as_torch_finds_them(model):
    assert named_modules(model) == list(model.named_modules())
    assert named_modules(model, remove_duplicate=False) == list(model.named_modules(remove_duplicate=False))
    assert modules_of(model) == list(model.modules())
    wanted = [*model.named_parameters(), *model.named_buffers()]
    found = list(named_tensors(model).items())
    assert [name for name, _ in found] == [name for name, _ in wanted]
    assert all(one.data_ptr() == other.data_ptr() for (_, one), (_, other) in zip(found, wanted, strict=True))
