"""Identity shortcuts are found by structure, replaced where they couple, and restored where possible."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import rewriters
from rewriters.labelling.propagate import Labelling
from rewriters.recording.capture import capture
from rewriters.shortcuts.residual_adds import coupling, residual_adds


def conv(inputs: int, outputs: int, **options) -> nn.Module:
    return nn.Conv2d(inputs, outputs, 3, padding=1, **options)


class Residual(nn.Module):
    """relu(x + conv(relu(conv(x)))), the add written in the way that `how` names."""

    def __init__(self, width: int, how: str = "out of place"):
        super().__init__()
        self.conv1, self.conv2 = conv(width, width), conv(width, width)
        self.how = how

    def forward(self, x):
        y = self.conv2(F.relu(self.conv1(x)))
        if self.how == "out of place":
            return F.relu(x + y)
        if self.how == "into the branch":
            y += x
            return F.relu(y)
        if self.how == "into the shortcut":
            x += y
            return F.relu(x)
        if self.how == "into the shortcut, by method":
            x.add_(y)
            return F.relu(x)
        if self.how == "torch.add":
            return F.relu(torch.add(y, x))
        return F.relu(y + F.dropout(F.avg_pool2d(x, 3, 1, 1), 0.1, self.training))


HOWS = [
    "out of place", "into the branch", "into the shortcut", "into the shortcut, by method", "torch.add",
    "pooled and dropped out",
]  # fmt: skip


class Stage(nn.Module):
    """A stem, blocks and a head."""

    def __init__(self, *blocks: nn.Module, width: int = 8):
        super().__init__()
        self.stem, self.blocks, self.head = conv(3, width), nn.Sequential(*blocks), nn.Conv2d(width, 5, 1)

    def forward(self, x):
        return self.head(self.blocks(self.stem(x)))


class Around(nn.Module):
    """x + inner(x)."""

    def __init__(self, inner: nn.Module, project: nn.Module | None = None):
        super().__init__()
        self.inner, self.project = inner, project or nn.Identity()

    def forward(self, x):
        return self.project(x) + self.inner(x)


def found(model: nn.Module, x: torch.Tensor) -> tuple[list[str], list[str]]:
    """Modules that hold a residual add, and those of them where it alone couples."""
    captured = capture(model.eval(), (x,))
    labelling = Labelling()
    labelling.run(captured)
    adds = residual_adds(captured, labelling)
    return [add.call.path for add in adds], [
        add.call.path for (add,) in coupling([captured], [(add,) for add in adds], {})
    ]


IMAGE = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("how", HOWS)
def test_residual_adds_are_found_however_they_are_written(how):
    assert found(Stage(Residual(8, how), Residual(8, how)), IMAGE) == (["blocks.0", "blocks.1"],) * 2


def test_a_projection_is_no_identity_shortcut():
    stage = Stage(Around(conv(8, 8), nn.Conv2d(8, 8, 1)), Around(conv(8, 8), nn.BatchNorm2d(8)))
    assert found(stage, IMAGE) == ([], [])


def test_an_add_of_two_branches_is_none():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.other = conv(8, 8), conv(8, 8)

        def forward(self, x):
            return F.relu(self.one(x)) + self.other(x)

    assert found(Stage(Two()), IMAGE) == ([], [])


def test_a_slice_of_an_earlier_tensor_is_none():
    class Pieces(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = conv(4, 4)

        def forward(self, x):
            first, second = x.chunk(2, 1)
            return torch.cat([first, second + self.inner(first)], 1)

    assert found(Stage(Pieces()), IMAGE) == ([], [])


def test_where_a_depthwise_convolution_couples_too_a_kernel_would_free_nothing():
    stage = Stage(Around(conv(8, 8, groups=8)), Around(nn.Sequential(conv(8, 16), conv(16, 8))))
    assert found(stage, IMAGE) == (["blocks.0", "blocks.1"], ["blocks.1"])


def test_where_both_sides_are_pinned_a_kernel_would_free_nothing():
    class Normed(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.inner = nn.GroupNorm(1, 8), conv(8, 8)

        def forward(self, x):
            return self.norm(x + self.inner(self.norm(x)))

    assert found(Stage(Normed()), IMAGE) == (["blocks.0"], [])


def test_the_models_input_as_a_shortcut_is_left():
    assert found(Around(nn.Sequential(conv(3, 8), conv(8, 3))), IMAGE) == ([], [])


def replaced(model: nn.Module, *inputs: torch.Tensor, **options) -> tuple[tuple, rewriters.UndoLog]:
    undo_log = rewriters.UndoLog()
    return rewriters.replace_shortcuts(model, inputs, {}, undo_log, **options).shortcuts, undo_log


def seeded(model: nn.Module, x: torch.Tensor, training: bool) -> torch.Tensor:
    torch.manual_seed(3)
    with torch.no_grad():
        return model.train(training)(x.clone())


@pytest.mark.parametrize("how", HOWS)
def test_replacing_changes_no_output_and_can_be_undone(how):
    model = Stage(Residual(8, how), Residual(8, how))
    names, wanted = list(model.state_dict()), [seeded(model, IMAGE, training) for training in (False, True)]
    shortcuts, undo_log = replaced(model, IMAGE)
    assert [one.path for one in shortcuts] == ["blocks.0.shortcut_conv", "blocks.1.shortcut_conv"]
    for training, before in zip((False, True), wanted, strict=True):
        torch.testing.assert_close(seeded(model, IMAGE, training), before)
    with torch.no_grad():
        model.get_parameter(shortcuts[0].weight).mul_(2)
    assert not torch.allclose(seeded(model, IMAGE, False), wanted[0])  # the convolution is in use
    undo_log.undo()
    assert list(model.state_dict()) == names
    assert torch.equal(seeded(model, IMAGE, False), wanted[0])


def test_what_was_written_into_the_shortcut_is_read_where_it_is_read_later():
    class Later(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = conv(8, 8)

        def forward(self, x):
            x = F.relu(x)
            y = self.inner(x)
            x.add_(y)
            return x * 2

    model = Stage(Later(), Residual(8))
    wanted = seeded(model, IMAGE, False)
    shortcuts, _ = replaced(model, IMAGE)
    assert [one.module for one in shortcuts] == ["blocks.0", "blocks.1"]
    torch.testing.assert_close(seeded(model, IMAGE, False), wanted)


def test_two_shortcuts_of_one_forward():
    class Dense(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.other = conv(8, 8), conv(8, 8)

        def forward(self, x):
            y = F.relu(x + self.one(x))
            return y + self.other(y)

    model = Stage(Dense())
    wanted = seeded(model, IMAGE, False)
    shortcuts, _ = replaced(model, IMAGE)
    assert [one.path for one in shortcuts] == ["blocks.0.shortcut_conv", "blocks.0.shortcut_conv_1"]
    torch.testing.assert_close(seeded(model, IMAGE, False), wanted)


def test_a_module_that_is_left_is_left_whole():
    """One of its adds could be rewritten, the other names its operands: nothing of it may change."""

    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.other = conv(8, 8), conv(8, 8)

        def forward(self, x):
            y = F.relu(x + self.one(x))
            return torch.add(input=y, other=self.other(y))

    model = Stage(Named(), Residual(8))
    names = [path for path, _ in model.named_modules()]
    shortcuts, _ = replaced(model, IMAGE)
    assert [one.module for one in shortcuts] == ["blocks.1"]
    assert {path for path, _ in model.named_modules()} == {*names, "blocks.1.shortcut_conv"}
    assert "forward" not in model.blocks[0].__dict__


def test_channels_that_come_last_get_a_linear_layer():
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.head = nn.Linear(6, 8), nn.Linear(8, 4)
            self.blocks = nn.Sequential(*(Around(nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 8)))
                                          for _ in range(2)))  # fmt: skip

        def forward(self, x):
            return self.head(self.blocks(self.stem(x)))

    model, x = Tokens(), torch.randn(2, 5, 6)
    wanted = seeded(model, x, False)
    shortcuts, _ = replaced(model, x)
    assert [type(model.get_submodule(one.path)) for one in shortcuts] == [nn.Linear] * 2
    torch.testing.assert_close(seeded(model, x, False), wanted)


def test_a_block_that_runs_twice_keeps_its_shortcut():
    block = Residual(8)
    shortcuts, _ = replaced(Stage(block, block, Residual(8)), IMAGE)
    assert [one.module for one in shortcuts] == ["blocks.2"]
    shortcuts, _ = replaced(Stage(block, Residual(8), block), IMAGE)
    assert not shortcuts  # the block before and after couples what the convolution would uncouple


def test_a_named_module_has_its_shortcuts_replaced_whether_or_not_they_couple():
    model = Stage(Around(conv(8, 8, groups=8)), Residual(8))
    shortcuts, _ = replaced(model, IMAGE, within=["blocks.0"])
    assert [one.module for one in shortcuts] == ["blocks.0"]


def test_a_named_module_without_identity_shortcut_is_an_error_that_names_those_with():
    with pytest.raises(rewriters.AutogateError, match=r"stem: it holds no identity shortcut.*blocks\.0"):
        replaced(Stage(Residual(8)), IMAGE, within=["stem"])


def test_a_named_module_that_runs_twice_is_an_error():
    block = Residual(8)
    with pytest.raises(rewriters.AutogateError, match=r"several times\. Leave it out of `shortcuts`"):
        replaced(Stage(block, block), IMAGE, within=["blocks.0"])
