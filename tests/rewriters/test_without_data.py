"""What calls give on tensors without data is what PyTorch says they give, told more quickly."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves

from rewriters.without_data import QUICKER


@pytest.mark.parametrize("op", QUICKER, ids=str)
def test_what_is_not_taken_apart_is_what_fake_tensors_would_give(op):
    x = torch.randn(2, 6, 4, 5).to(memory_format=torch.channels_last)
    vector, matrix = torch.rand(6), torch.randn(6, 3)
    calls = {
        torch.ops.aten.native_batch_norm.default: [
            ((x, vector, vector, vector, vector, training, 0.1, 1e-5), {}) for training in (False, True)
        ],
        torch.ops.aten.addmm.default: [((matrix[0], x[0, 0].T[:, [0] * 6], matrix), {"beta": 2})],
    }
    for args, kwargs in calls.get(op, [((x,), {})]):
        with FakeTensorMode() as mode:
            args = tuple(mode.from_tensor(arg) if isinstance(arg, torch.Tensor) else arg for arg in args)
            got, wanted = (tree_leaves(run(*args, **kwargs)) for run in (QUICKER[op], op))
            assert [(a.shape, a.stride(), a.dtype) for a in got] == [(b.shape, b.stride(), b.dtype) for b in wanted]
            if op._schema.is_mutable:
                assert got[0] is args[0]
