"""The loss of a run: distillation, and a loss that is not finite."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import autogate
from autogate.training import Distillation, Images, Network, Recipe, loop, start
from autogate.training.checkpoint import load_checkpoint
from autogate.training.learning import Loss, distance
from tests.autogate.training.runs import recipe


def test_a_loss_that_is_not_finite_ends_the_run(pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(loop.Loss, "__call__", lambda self, model, images, labels: model(images).sum() * torch.inf)
    with pytest.raises(autogate.AutogateError, match="no longer finite at step"):
        start(recipe(pictures), tmp_path / "run")
    assert load_checkpoint(tmp_path / "run" / "last.pt").position.step == 0  # the good one stays


def test_distillation_is_the_kl_divergence():
    torch.manual_seed(0)
    logits, wanted = torch.randn(2, 4, 5).double().unbind(0)
    student, teacher = (logits / 3).softmax(1), (wanted / 3).softmax(1)
    divergence = (teacher * (teacher.log() - student.log())).sum(1).mean()
    assert distance(logits, wanted, 3.0).item() == pytest.approx(9 * divergence.item(), rel=1e-5)


def test_the_teacher_has_its_part_of_the_loss():
    torch.manual_seed(0)
    model, teacher = nn.Linear(4, 3), nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    images, labels = torch.randn(6, 4), torch.randint(3, (6,))
    plain = F.cross_entropy(model(images), labels)
    asked = Recipe(Network("test_resnet"), Images("cifar10"), distillation=Distillation(0.25, 2.0))
    loss = Loss.of(asked, 3, teacher)
    got = loss(model, images, labels)
    assert got.item() == pytest.approx((0.75 * plain + 0.25 * distance(model(images), teacher(images), 2.0)).item())
    got.backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert teacher[1].num_batches_tracked == 0 and not teacher.training
