"""Quick meta kernels give what PyTorch's own give."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map_only

from rewriters.recording import meta_kernels
from rewriters.recording.meta_kernels import META_KERNELS, META_OPS, MetaMode, fakify, run_on_fakes

aten = torch.ops.aten
UNKNOWN = {aten._grouped_mm.default}  # torch has no kernel without data for it in single precision
OPS = sorted({*META_KERNELS, *META_OPS} - UNKNOWN, key=str)

PLAIN = torch.zeros(2, 6, 4, 5)
LAYOUTS = {
    "plain": PLAIN,
    "channels last": PLAIN.to(memory_format=torch.channels_last),
    "transposed": PLAIN.transpose(1, 3),
    "sliced": PLAIN[:, ::2],
    "expanded": torch.zeros(2, 1, 4, 5).expand(2, 6, 4, 5),
    "one a channel": torch.zeros(6, 1, 1),
    "one a channel and sample": torch.zeros(2, 6, 1, 1),
    "row": torch.zeros(5),
    "number": torch.zeros(()),
    "empty": torch.zeros(0, 6, 4, 5),
    "whole": torch.zeros(2, 6, 4, 5, dtype=torch.int64),
    "half": torch.zeros(2, 6, 4, 5, dtype=torch.float16),
}
ROWS = torch.zeros(2, 3, 6)
GRID = torch.zeros(2, 3, 7, 2)
VECTOR, MATRIX = torch.zeros(6), torch.zeros(6, 3)


def convolutions() -> Iterator[tuple[Any, ...]]:
    plain = [1, 1], [0, 0], [1, 1], False, [0, 0]
    images = (PLAIN, LAYOUTS["channels last"], PLAIN[0], LAYOUTS["half"])
    for x, weight, bias in itertools.product(images, (torch.zeros(8, 6, 1, 1), torch.zeros(8, 6, 3, 3)), (0, 8, 6)):
        yield x, weight, torch.zeros(bias) if bias else None, *plain, 1
    yield PLAIN, torch.zeros(8, 6, 3, 3), None, [1, 1], [0], [1, 1], False, [0], 1  # padding="valid" comes so
    yield PLAIN, torch.zeros(8, 6, 3, 3), None, [2], [1], [2], False, [0], 1
    yield PLAIN, torch.zeros(6, 1, 3, 2), None, [2, 1], [1, 2], [1, 2], False, [0, 0], 6
    yield PLAIN, torch.zeros(6, 2, 3, 3), None, *plain, 3
    yield PLAIN, torch.zeros(8, 2, 3, 3), None, *plain, 3  # 8 channels in 3 groups
    yield PLAIN, torch.zeros(8, 4, 3, 3), None, *plain, 1  # of 6 channels
    yield PLAIN, torch.zeros(8, 6, 7, 7), None, *plain, 1  # larger than the image
    yield PLAIN, torch.zeros(6, 4, 3, 3), None, [2, 2], [1, 1], [1, 1], True, [1, 1], 1
    yield PLAIN[0], torch.zeros(8, 4, 3), None, [1], [1], [1], False, [0], 2
    yield torch.zeros(2, 6, 4, 5, 7), torch.zeros(3, 6, 1, 2, 3), None, [1] * 3, [0] * 3, [1] * 3, False, [0] * 3, 1


def layer_norms() -> Iterator[tuple[Any, ...]]:
    for x, weight in itertools.product((ROWS, ROWS.transpose(0, 1), ROWS.half()), (VECTOR, None, VECTOR[:3])):
        yield x, [6], weight, weight, 1e-5
    yield ROWS, [3, 6], None, None, 1e-5
    yield ROWS, [3], None, None, 1e-5


CALLS: dict[Any, list[tuple[Any, ...]]] = {
    aten.native_batch_norm.default: [
        (LAYOUTS[layout], vector, vector, mean, mean, training, 0.1, 1e-5)
        for layout in ("plain", "channels last", "sliced")
        for vector, mean in ((VECTOR, VECTOR), (None, VECTOR), (VECTOR[:3], VECTOR))
        for training in (False, True)
    ],
    aten.native_layer_norm.default: list(layer_norms()),
    aten.convolution.default: list(convolutions()),
    aten.addmm.default: [(bias, MATRIX.T, MATRIX) for bias in (MATRIX[0], VECTOR, torch.zeros(()))]
    + [(MATRIX[0], MATRIX, MATRIX)],
    aten.pow.Tensor_Scalar: [(x, exponent) for x in LAYOUTS.values() for exponent in (2, 0.5, -1)],
    aten.mm.default: [(MATRIX.T, MATRIX), (MATRIX, MATRIX)],
    aten.bmm.default: [(ROWS, ROWS.transpose(1, 2)), (ROWS, ROWS), (ROWS, ROWS.half().transpose(1, 2))],
    aten.cat.default: [
        ([LAYOUTS[first], LAYOUTS[second]], dim)
        for first, second in itertools.product(LAYOUTS, ("plain", "channels last", "one a channel", "empty", "half"))
        for dim in (0, 1, -1, 4)
    ],
    aten.mean.dim: [
        (x, dims, keep) for x in LAYOUTS.values() for dims in ([2, 3], [-1], [1, 1], [9], [], None) for keep in (0, 1)
    ],
    aten.grid_sampler_2d.default: [
        (LAYOUTS[layout], grid, 0, 0, align)
        for layout in ("plain", "channels last", "half", "whole", "empty")
        for grid in (GRID, GRID.permute(0, 2, 1, 3), GRID.half(), GRID[:1], torch.zeros(2, 3, 7, 3), torch.zeros(0))
        for align in (False, True)
    ],
    aten.empty.memory_format: [([2, 3],), ([0],)],
    aten._softmax.default: [(x, -1, False) for x in LAYOUTS.values()],
    aten._safe_softmax.default: [(x, *rest) for x in LAYOUTS.values() for rest in ((-1,), (4,), (0, torch.float64))],
    aten.expand.default: [(x, [2, 6, 4, 5]) for x in LAYOUTS.values()],
    aten.view.default: [(x, shape) for x in LAYOUTS.values() for shape in ([2, -1], [2, 6, 20], [7])],
    aten._unsafe_view.default: [(PLAIN, [2, 6, 20]), (PLAIN, [7])],
    aten.permute.default: [(PLAIN, [0, 2, 3, 1]), (PLAIN, [0, 1])],
    aten.select.int: [(PLAIN, 1, -1), (PLAIN, 1, 6)],
    aten.slice.Tensor: [(PLAIN, 1, 1, 9, 2), (PLAIN, 5, 0, 1)],
    aten.split.Tensor: [(PLAIN, 4, 1), (PLAIN, 4, 7)],
    aten.split_with_sizes.default: [(PLAIN, [2, 4], 1), (PLAIN, [2, 2], 1)],
    aten.squeeze.dim: [(LAYOUTS["one a channel"], 1), (PLAIN, 1)],
    aten.t.default: [(MATRIX,), (PLAIN,)],
    aten.transpose.int: [(PLAIN, 1, -1), (PLAIN, 1, 4)],
    aten.unbind.int: [(PLAIN, 1), (PLAIN, 4)],
    aten.unsqueeze.default: [(PLAIN, 1), (PLAIN, 7)],
}
OF_ONE = [(x,) for x in LAYOUTS.values()]
OF_TWO = [(x, y) for x in LAYOUTS.values() for y in (*LAYOUTS.values(), 2, 0.5)]


def calls(op: Any) -> list[tuple[Any, ...]]:
    return CALLS.get(op) or (OF_TWO if len(op._schema.arguments) > 1 and "other" in str(op._schema) else OF_ONE)


def described(run: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What the results look like and which argument each of them shares memory with; the failure, if it fails."""
    try:
        out = run(*args, **kwargs)
    except Exception as error:
        return type(error)
    given = [leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor)]
    memory = [tensor.untyped_storage()._cdata for tensor in given]
    return type(out), [
        (tuple(one.shape), one.stride(), one.storage_offset(), one.dtype, one.device, one.requires_grad,
         [one is tensor for tensor in given], [one.untyped_storage()._cdata == other for other in memory])
        for one in tree_leaves(out)
    ]  # fmt: skip


@pytest.mark.parametrize("op", OPS, ids=str)
def test_what_is_told_of_a_call_is_what_fake_tensors_would_give(op, monkeypatch):
    asked = []
    kwargs = {"dtype": torch.uint8, "device": torch.device("cpu")} if op is aten.empty.memory_format else {}
    if op in META_KERNELS:  # without a doubt: not by falling back
        told = META_KERNELS[op]
        watch = lambda *args, **kwargs: asked.append(told(*args, **kwargs)) or asked[-1]  # noqa: E731
        monkeypatch.setattr(meta_kernels, "META_KERNELS", {op: watch})
    for real in calls(op):
        with FakeTensorMode() as mode, torch.no_grad():
            args = tree_map_only(Tensor, mode.from_tensor, real)
            got = described(lambda *args, **kwargs: run_on_fakes(mode, op, args, kwargs), args, kwargs)
            wanted = described(op, args, kwargs)
        if isinstance(wanted, type):
            assert isinstance(got, type) and issubclass(got, Exception), real
        else:
            assert got == wanted, tree_map_only(Tensor, lambda tensor: (tuple(tensor.shape), tensor.stride()), real)
    assert op not in META_KERNELS or any(out is not NotImplemented for out in asked)


@pytest.mark.parametrize("op", sorted(META_KERNELS.keys() - UNKNOWN, key=str), ids=str)
def test_on_meta_tensors_too(op):
    """But for a batch norm's second results: in eval mode there are none, only kernels for meta tensors give some."""
    kwargs = {"dtype": torch.uint8, "device": torch.device("meta")} if op is aten.empty.memory_format else {}
    for real in calls(op):
        args = tree_map_only(Tensor, lambda tensor: tensor.to("meta"), real)
        wanted = described(op, args, kwargs)
        with MetaMode():
            got = described(op, args, kwargs)
        if isinstance(wanted, type):
            assert isinstance(got, type)
        else:
            assert got[0] == wanted[0] and got[1][0] == wanted[1][0]


@pytest.mark.parametrize(
    "tensor",
    [
        *LAYOUTS.values(),
        nn.Parameter(torch.zeros(3, 4)),
        nn.Parameter(torch.zeros(3, 4), requires_grad=False),
        nn.Parameter(torch.zeros(3, 4).T),
        torch.zeros(3, dtype=torch.complex64),
    ],
    ids=lambda tensor: f"{tuple(tensor.shape)} {tensor.stride()} {tensor.dtype}",
)
def test_a_stand_in_is_what_pytorch_would_make_of_the_tensor(tensor):
    mode = FakeTensorMode()
    got, wanted = fakify(mode, tensor), mode.from_tensor(tensor)
    for look in (type, Tensor.size, Tensor.stride, lambda one: one.dtype, lambda one: one.device):
        assert look(got) == look(wanted)
    assert got.requires_grad == wanted.requires_grad == tensor.requires_grad
    assert isinstance(got, nn.Parameter) == isinstance(wanted, nn.Parameter) == isinstance(tensor, nn.Parameter)


@pytest.mark.parametrize(
    ("rows", "kernels", "groups"), [((6, 8), (3, 8, 5), 3), ((6, 8), (3, 4, 5), 3), ((6, 8), (3, 8, 4), 2)]
)
def test_experts_in_single_precision(rows, kernels, groups):
    real = torch.zeros(rows), torch.zeros(kernels).mT.contiguous().mT, torch.full((groups,), 2, dtype=torch.int32)
    mode = FakeTensorMode()
    args = tree_map_only(Tensor, mode.from_tensor, real)
    with mode:
        got = described(lambda *args: run_on_fakes(mode, aten._grouped_mm.default, args, {}), args, {})
    wanted = described(aten._grouped_mm.default, real, {})
    assert got[1] == wanted[1] if not isinstance(wanted, type) else isinstance(got, type)


def test_stand_ins_are_made_like_the_first_without_what_it_got_later():
    mode = FakeTensorMode()
    parameter, buffer = fakify(mode, nn.Parameter(torch.zeros(3))), fakify(mode, torch.zeros(3))
    wanted = FakeTensor(mode, torch.empty(3, device="meta"), torch.device("cpu"))
    assert isinstance(parameter, nn.Parameter) and not isinstance(buffer, nn.Parameter)
    assert vars(buffer) == vars(wanted)
    with pytest.raises(RuntimeError):
        buffer.data_ptr()


def test_tensors_on_two_devices_are_refused():
    with FakeTensorMode() as mode:
        x, y = torch.empty(3), torch.empty(3, device="cuda")
        with pytest.raises(RuntimeError):
            run_on_fakes(mode, aten.add.Tensor, (x, y), {})


def test_a_tensor_of_known_values_keeps_them():
    with FakeTensorMode() as mode:
        number = torch.tensor(3.0)
        assert run_on_fakes(mode, aten.mul.Tensor, (number, number), {}).item() == 9


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    "x",
    [
        torch.zeros(2, 5, 6).transpose(1, 2),
        torch.zeros(6, 2).t(),
        torch.zeros(4, 6, 2, 5).permute(2, 1, 0, 3),
        *(LAYOUTS[name] for name in ("plain", "channels last", "transposed")),
        torch.zeros(2, 12, 4, 5).to(memory_format=torch.channels_last)[:, :6],
    ],
    ids=lambda x: f"{tuple(x.shape)} {x.stride()}" if isinstance(x, Tensor) else None,
)
def test_a_batch_norm_has_the_memory_order_of_the_real_one(x, training):
    vectors = [torch.ones(x.shape[1]) for _ in range(4)]
    real = aten.native_batch_norm(x, *vectors, training, 0.1, 1e-5)[0]
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(tensor) for tensor in (x, *vectors)]
        fake = run_on_fakes(mode, aten.native_batch_norm.default, (*fakes, training, 0.1, 1e-5), {})[0]
    assert fake.stride() == real.stride()
