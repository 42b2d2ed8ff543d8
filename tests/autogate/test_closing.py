"""Gates closed at once by a criterion: the budget is met, the slim model is exact, the rest of the model stays."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import autogate
from autogate.criteria import CRITERIA
from rewriters import AutogateError, run_eval
from tests.autogate.criteria.nets import IMAGES, LABELS, chain, stage

BATCHES = [(IMAGES, LABELS), (IMAGES.flip(0), LABELS)]


def wide(width: int = 64) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.Dropout(),
        nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(),
        nn.Conv2d(width, width, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 5),
    )  # fmt: skip


@pytest.mark.parametrize("by", CRITERIA)
@pytest.mark.parametrize("allocation", ["global", "uniform"])
def test_each_criterion_meets_the_budget_and_finalize_is_exact(by, allocation):
    model = autogate.prepare(wide(), IMAGES, flops=0.4)
    autogate.close(model, by, batches=BATCHES, loss=F.cross_entropy, allocation=allocation)
    gated = run_eval(model, (IMAGES,))[0]
    assert autogate.gates(model).shares()["FLOPs"] == pytest.approx(0.4, abs=0.01)
    assert torch.allclose(run_eval(autogate.finalize(model), (IMAGES,))[0], gated, atol=1e-5)


def test_the_lowest_scores_close():
    model = autogate.prepare(chain(), IMAGES, flops=0.5)
    given = torch.randperm(autogate.gates(model).channel_map.size).float()
    autogate.close(model, lambda bank: given, allocation="uniform")
    bank = autogate.gates(model)
    for group in bank.channel_map.groups():
        classes = torch.tensor(group.classes)
        live = bank.live[classes]
        assert live.any() and not live.all()
        assert given[classes][live].min() > given[classes][~live].max()


def test_uniform_keeps_the_same_part_of_all_layers():
    model = autogate.close(autogate.prepare(wide(), IMAGES, flops=0.3), allocation="uniform")
    slim = autogate.finalize(model)
    widths = [layer.out_channels for layer in slim if isinstance(layer, nn.Conv2d)]
    assert max(widths) - min(widths) <= 1 < min(widths)


def test_a_class_with_an_infinite_score_stays():
    model = autogate.prepare(wide(), IMAGES, flops=0.5)
    scores = torch.rand(autogate.gates(model).channel_map.size)
    scores[:64] = torch.inf
    autogate.close(model, lambda bank: scores)
    assert autogate.gates(model).live[:64].all() and not autogate.gates(model).live.all()


def test_a_class_counts_for_less_the_more_it_costs():
    """With equal scores, dividing by the price closes fewer, dearer classes."""
    closed = {}
    for over_price in (False, True):
        model = autogate.prepare(wide(), IMAGES, flops=0.5)
        autogate.close(model, lambda bank: torch.rand(bank.channel_map.size) + 1, over_price=over_price)
        closed[over_price] = int((~autogate.gates(model).live).sum())
    assert closed[True] < closed[False]


def test_widths_end_with_multiples():
    model = autogate.close(autogate.prepare(wide(), IMAGES, flops=0.5, round_to=8), by="random")
    widths = [layer.out_channels for layer in autogate.finalize(model) if isinstance(layer, nn.Conv2d)]
    assert all(width % 8 == 0 for width in widths) and len(set(widths)) > 1


def test_falling_budgets_close_more_and_more():
    model = autogate.prepare(wide(), IMAGES, flops=0.3)
    bank, dead = autogate.gates(model), torch.zeros(3 * 64, dtype=torch.bool)
    for share in (0.8, 0.5, None):
        autogate.close(model, "l2", flops=share)
        assert bank.shares()["FLOPs"] == pytest.approx(share or 0.3, abs=0.01)
        assert (dead <= ~bank.live).all()
        dead = ~bank.live
    before = int(dead.sum())
    autogate.close(model, "l1", flops=0.9)  # met long ago
    assert int((~bank.live).sum()) == before


def test_budgets_of_other_resources():
    model = autogate.prepare(wide(), IMAGES, flops=0.9)
    autogate.close(model, params=0.4, activations=0.8)
    assert sum(p.numel() for p in autogate.finalize(model).parameters()) == pytest.approx(
        0.4 * sum(p.numel() for p in wide().parameters()), rel=0.02
    )


def test_training_goes_on_from_a_looser_budget():
    model = autogate.prepare(wide(), IMAGES, flops=0.4, steps=30)
    autogate.close(model, flops=0.7)
    bank, dead = autogate.gates(model), ~autogate.gates(model).live
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(30):
        optimizer.zero_grad()
        F.cross_entropy(model(IMAGES), LABELS).backward()
        optimizer.step()
    assert bank.shares()["FLOPs"] <= 0.41
    assert (dead <= ~bank.live).all()
    autogate.finalize(model)


def test_in_the_middle_of_training():
    model = autogate.prepare(wide(), IMAGES, flops=0.4, steps=1000)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(model(IMAGES), LABELS).backward()
        optimizer.step()
    gated = run_eval(autogate.finalize(autogate.close(copy.deepcopy(model), "taylor", batches=BATCHES,
                                                      loss=F.cross_entropy)), (IMAGES,))[0]  # fmt: skip
    autogate.close(model, "taylor", batches=BATCHES, loss=F.cross_entropy)
    assert torch.equal(run_eval(model, (IMAGES,))[0].argmax(1), gated.argmax(1))


@pytest.mark.parametrize("by", ["taylor", "activation", "random"])
def test_the_model_keeps_mode_gradients_and_buffers(by):
    model = autogate.prepare(wide(), IMAGES, flops=0.5)
    model[4].weight.requires_grad_(False)
    model.train()
    model[5].eval()
    F.cross_entropy(model(IMAGES), LABELS).backward()
    modes = {name: module.training for name, module in model.named_modules()}
    grads = {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
    asked = {name: p.requires_grad for name, p in model.named_parameters()}
    buffers = {name: b.clone() for name, b in model.named_buffers() if not name.startswith("autogate.")}
    drawn = torch.get_rng_state()
    autogate.close(model, by, batches=BATCHES, loss=F.cross_entropy)
    assert torch.equal(torch.get_rng_state(), drawn)
    assert modes == {name: module.training for name, module in model.named_modules()}
    assert asked == {name: p.requires_grad for name, p in model.named_parameters()}
    assert all(torch.equal(b, model.get_buffer(name)) for name, b in buffers.items())
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == (grads[name] is None)
        assert parameter.grad is None or torch.equal(parameter.grad, grads[name])


def test_a_model_that_returns_its_loss_and_takes_keywords():
    class Answer(dict):
        loss = property(lambda self: self["loss"])

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = wide()

        def forward(self, images, labels=None):
            logits = self.body(images)
            return Answer(logits=logits) if labels is None else Answer(loss=F.cross_entropy(logits, labels))

    model = autogate.prepare(Net(), {"images": IMAGES}, flops=0.5)
    autogate.close(model, "fisher", batches=[{"images": IMAGES, "labels": LABELS}])
    assert autogate.gates(model).shares()["FLOPs"] == pytest.approx(0.5, abs=0.01)


@pytest.fixture(scope="module")
def prepared():
    """A model that no test of this file may change."""
    return autogate.prepare(wide(), IMAGES)


def wrong(what: str) -> dict:
    return {
        "an unknown criterion": {"by": "taylr"},
        "no batches": {"by": "activation"},
        "no loss": {"by": "taylor", "batches": BATCHES},
        "an empty loader": {"by": "activation", "batches": []},
        "a loss without gradient": {"by": "taylor", "batches": BATCHES, "loss": lambda y, _: y.detach().sum()},
        "a loss of no kernel": {
            "by": "taylor", "batches": BATCHES, "loss": lambda y, _: torch.zeros(1, requires_grad=True).sum()
        },
        "a loss a sample": {"by": "taylor", "batches": BATCHES, "loss": lambda y, _: y.sum(1)},
        "an infinite loss": {"by": "taylor", "batches": BATCHES, "loss": lambda y, _: y.sum() * torch.inf},
        "NaN": {"by": lambda bank: torch.full((bank.channel_map.size,), torch.nan)},
        "another shape": {"by": lambda bank: torch.zeros(3)},
        "no tensor": {"by": lambda bank: [0.0] * bank.channel_map.size},
        "no criterion": {"by": 3},
        "another allocation": {"allocation": "local"},
        "a share out of range": {"flops": 1.5},
        "a budget out of reach": {"flops": 1e-6},
        "nothing that may go": {"by": lambda bank: torch.full((bank.channel_map.size,), torch.inf)},
    }[what]  # fmt: skip


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("an unknown criterion", "no criterion 'taylr'.*Did you mean 'taylor'"),
        ("no batches", "'activation' needs batches, and none"),
        ("no loss", "needs a loss, and none"),
        ("an empty loader", "yields none"),
        ("a loss without gradient", "gives no gradient"),
        ("a loss of no kernel", "gives no gradient to any kernel"),
        ("a loss a sample", r"shape \(4,\); it must be one number"),
        ("an infinite loss", "gradient of batch 0 is not finite"),
        ("NaN", r"192 of 192 classes no score \(NaN\)"),
        ("another shape", r"shape \(3,\); it must return one real number a class, shape \(192,\)"),
        ("no tensor", "returned list"),
        ("no criterion", "`by` is of type int"),
        ("another allocation", "global or uniform"),
        ("a share out of range", r"in \(0, 1\]"),
        ("a budget out of reach", "can't be reached"),
        ("nothing that may go", "out of reach: 1.000 of the FLOPs are left for 0.500"),
    ],
)
def test_what_is_wrong_is_said_and_nothing_closes(prepared, what, says):
    model = prepared
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(AutogateError, match=says):
        autogate.close(model, **wrong(what))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_model_without_gates():
    with pytest.raises(AutogateError, match="it has no gates"):
        autogate.close(wide())


def test_no_batch_norms_for_network_slimming():
    model = autogate.prepare(chain(norms=False), IMAGES)
    with pytest.raises(AutogateError, match="has a batch norm"):
        autogate.close(model, "bn_scale")


def test_classes_behind_one_residual_stage_close_together():
    model = autogate.finalize(autogate.close(autogate.prepare(stage(), IMAGES, flops=0.5), allocation="uniform"))
    assert model.stem.out_channels == model.blocks[0][0].in_channels == model.blocks[1][3].out_channels < 8
