"""Distillation without labels: a slim network learns the dense one's answers (Hinton et al., "Distilling the Knowledge
in a Neural Network") on training images."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.accuracy.data import augment
from benchmarks.one_shot.networks import Subject


@dataclass(frozen=True)
class Distillation:
    """How a slim network learns: Adam, with a rate that falls to zero as a cosine, and no weight decay.

    Attributes:
        steps: optimizer steps.
        batch: images a step.
        lr: learning rate at first.
        norms: whether batch norms take new statistics. If not, they run in eval mode: on images far from those that the
            dense network was trained on, new ones make another network of it.
    """

    steps: int = 300
    batch: int = 16
    lr: float = 1e-3
    norms: bool = True


def distilled(slim: nn.Module, subject: Subject, how: Distillation) -> nn.Module:
    """Train a slim network, in place, to give the dense one's answers. Every network sees the same images."""
    optimizer = torch.optim.Adam(slim.parameters(), how.lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, how.steps)
    torch.manual_seed(0)
    slim.train(how.norms)
    for _step in range(how.steps):
        chosen = torch.randint(len(subject.unlabelled), (how.batch,))
        images = subject.ready(augment(subject.unlabelled[chosen]))
        with torch.no_grad():
            wanted = subject.model(images).softmax(1)
        optimizer.zero_grad()
        F.cross_entropy(slim(images), wanted).backward()
        optimizer.step()
        schedule.step()
    return slim.eval()
