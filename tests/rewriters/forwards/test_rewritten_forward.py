"""A rewritten forward replaces the module's own, compiled or interpreted."""

from __future__ import annotations

import copy
import gc
import inspect
import linecache
import math
import pickle
import traceback

import pytest
import torch
import torch.nn.functional as F

from rewriters.analysis.analyse import analyse
from rewriters.forwards.generated_code import GeneratedFunction
from rewriters.forwards.guards import ShapeGuardError
from rewriters.forwards.rewritten_forward import InterpretedForward, RewrittenForward
from rewriters.outputs import relative_error, run_eval
from rewriters.slimming.dry_run import dry_run
from rewriters.slimming.plan import apply
from rewriters.undo_log import UndoLog
from tests.rewriters.exactness import TOLERANCE, slim
from tests.rewriters.forwards.networks import Modes, Split, rewritten, slim_and_gated, traced_in
from tests.rewriters.helpers import Net, conv, image


def test_a_rewritten_forward_runs_at_other_batch_sizes_and_resolutions():
    slim_model, gated = slim_and_gated(Split, image(size=4).double())
    for batch, size in ((1, 4), (5, 4), (2, 6), (3, 8)):
        args = (image(size=size, batch=batch).double(),)
        assert relative_error(run_eval(slim_model, args), run_eval(gated, args)) <= TOLERANCE


def test_other_control_flow_than_the_traced_one_raises():
    slim_model, _ = slim_and_gated(Split, image(size=4).double())
    with pytest.raises(ShapeGuardError, match=r"was traced where a value at .* was"):
        slim_model(image(size=12).double())
    with pytest.raises(ShapeGuardError):
        slim_model(image(size=4).double(), torch.ones(1).double())


def test_signature_defaults_and_keywords_survive():
    slim_model, gated = slim_and_gated(Split, image().double(), power=2.0)
    parameters = inspect.signature(slim_model.forward.functions[False][0].run).parameters
    assert list(inspect.signature(slim_model.forward).parameters) == list(parameters)[1:]
    assert list(parameters) == ["self", "x", "scale", "power"]
    assert parameters["scale"].default is None
    args = (image(batch=3).double(),)
    for kwargs in ({"power": 2.0}, {"scale": None, "power": 3.0}):
        assert relative_error(run_eval(slim_model, args, kwargs), run_eval(gated, args, kwargs)) <= TOLERANCE


def lines_kept() -> int:
    return sum(name.startswith("<autogate") for name in linecache.cache)


def test_what_is_rewritten_for_a_trial_leaves_nothing_behind():
    gc.collect()
    before = lines_kept()
    model = Split().eval()
    dry_run(model, analyse(model, (image(),)), (image(),))
    gc.disable()  # forwards go without it
    try:
        assert lines_kept() == before
        slim_model, _ = slim_and_gated(Split, image().double())
        assert lines_kept() == before + 1
        del slim_model
    finally:
        gc.enable()
    gc.collect()
    assert lines_kept() == before


def test_the_rehearsal_compiles_nothing(monkeypatch):
    model = Modes().eval()
    analysis = analyse(model, (image(),))
    monkeypatch.setattr(GeneratedFunction, "_compile", lambda self: pytest.fail("compiled"))
    dry_run(model, analysis, (image(),))
    with pytest.raises(pytest.fail.Exception, match="compiled"):
        slim_and_gated(Modes, image().double())


def test_forwards_of_the_same_code_share_it():
    blocks = [rewritten(Split(), image()) for _ in range(2)]
    codes = {block.forward.function(training).__code__ for block in blocks for training in (False, True)}
    assert len({id(code) for code in codes}) == 1
    other = rewritten(Split(), image(), scale=2.0)
    assert other.forward.__code__ not in codes
    with pytest.raises(ShapeGuardError) as raised:
        other(image(size=16), scale=2.0)
    assert "guard(" in "".join(traceback.format_tb(raised.tb))


def test_the_module_stays_what_it_was():
    slim_model, _ = slim_and_gated(Split, image().double())
    assert type(slim_model) is Split
    assert isinstance(slim_model.forward, RewrittenForward)
    assert [name for name, _ in slim_model.named_children()] == ["a", "b", "c"]


def test_a_rewritten_forward_is_copied_and_pickled_with_its_module():
    slim_model, _ = slim_and_gated(Split, image().double())
    example = (image().double(),)
    for other in (copy.deepcopy(slim_model), pickle.loads(pickle.dumps(slim_model))):
        assert other.forward.owner is other
        assert torch.equal(run_eval(other, example)[0], run_eval(slim_model, example)[0])
        with torch.no_grad():
            other.c.bias += 1
        assert not torch.equal(run_eval(other, example)[0], run_eval(slim_model, example)[0])


def test_an_interpreted_forward_does_what_the_compiled_one_does():
    class Block(Modes):
        def __init__(self):
            super().__init__()
            self.again = self.c

        def forward(self, x, *others, scale=1.0, **more):
            x = sum(others, x) * scale + more.get("shift", 0.0)
            out = super().forward(x)
            return self.again(F.pad(out[0] if self.training else out, (0, 0, 0, 0, 0, 6)))

    block = Block()
    given, options = (image(), image()), {"scale": 2.0, "shift": 1.0}
    graphs = {training: (traced_in(block, training, given, options),) for training in (False, True)}
    assert str(graphs[True][0]) != str(graphs[False][0])
    plain = {training: block.train(training)(*given, **options) for training in (False, True)}
    for kind in (InterpretedForward, RewrittenForward):
        forward = kind(block, graphs)
        assert all(torch.equal(block.train(mode) and forward(*given, **options), plain[mode]) for mode in plain)
        with pytest.raises(TypeError, match="missing"):
            forward(scale=2.0)


def test_train_and_eval_keep_their_own_graphs():
    slim_model, gated = slim_and_gated(Modes, image().double())
    assert slim_model.forward.source(True) != slim_model.forward.source(False)
    example = image().double()
    assert relative_error(run_eval(slim_model, (example,)), run_eval(gated, (example,))) <= TOLERANCE
    out, mean = slim_model.train()(example)
    assert out.shape == (2, 2, 4, 4)
    assert mean.shape[0] == 2


@pytest.mark.parametrize(
    "factor",
    [
        lambda y: math.ceil(y.shape[1] / 3) / math.ceil(y.shape[2] / 3),
        lambda y: math.sqrt(y.shape[1] * y.shape[2]),
        lambda y: len(y[0]) / len(y),
        lambda y: min(y.shape[1], y.shape[3]),
    ],
    ids=["ceil", "sqrt", "len", "min"],
)
def test_a_rewritten_forward_is_rewritten_again_for_all_sizes(factor):
    """Its code holds functions that user code looks up by name."""

    def forward(m, x):
        first, second = m.a(x).split([8, 8], 1)
        return m.head(first.tanh() * m.b(second * factor(second)))

    model = Net(forward, a=conv(3, 16), b=conv(8, 8), head=conv(8, 2)).double().eval()
    other = torch.randn(3, 3, 6, 5, dtype=torch.float64)
    for seed in range(2):
        width = model.a.out_channels
        slimmed = slim(model, (image().double(),), share=0.7, seed=seed)
        assert slimmed.plan.forwards and model.a.out_channels < width and slimmed.error <= TOLERANCE
        got = run_eval(model, (other,))
        slimmed.undo_log.undo()
        assert relative_error(got, run_eval(model, (other,))) <= TOLERANCE
        apply(model, slimmed.plan, UndoLog())
