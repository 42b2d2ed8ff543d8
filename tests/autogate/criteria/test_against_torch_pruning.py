"""Scores of criteria are those of Torch-Pruning's importances, group by group."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch_pruning as tp
from torch import Tensor, nn

import autogate
from autogate.criteria import Batches, scores_of
from rewriters import Side
from tests.autogate.criteria.nets import IMAGES, LABELS, chain, stage

IMPORTANCES = {
    "l1": lambda: tp.importance.GroupMagnitudeImportance(p=1),
    "l2": lambda: tp.importance.GroupMagnitudeImportance(p=2),
    "bn_scale": tp.importance.BNScaleImportance,
    "lamp": tp.importance.LAMPImportance,
}


def theirs(net: nn.Module, convolution: str, importance: Callable[[Any], Tensor]) -> Tensor:
    """Torch-Pruning's scores of the output channels of a convolution."""
    layer = net.get_submodule(convolution)
    graph = tp.DependencyGraph().build_dependency(net, IMAGES)
    return importance(graph.get_pruning_group(layer, tp.prune_conv_out_channels, list(range(layer.out_channels))))


def ours(net: nn.Module, convolution: str, by: str, batches: Batches | None = None) -> Tensor:
    """The same channels' scores by a criterion of ours. This prepares the network."""
    bank = autogate.gates(autogate.prepare(net, IMAGES))
    return scores_of(net, bank, by, batches)[bank.channel_map.classes[Side(f"{convolution}.weight", 0)]].float()


@pytest.mark.parametrize(
    ("net", "convolution"), [(chain, "0"), (chain, "3"), (stage, "stem"), (stage, "blocks.0.0"), (stage, "blocks.1.0")]
)
@pytest.mark.parametrize("by", IMPORTANCES)
def test_the_scores_are_the_same(net, convolution, by):
    torch.manual_seed(1)
    model = net()
    wanted = theirs(model, convolution, IMPORTANCES[by]())
    assert torch.allclose(ours(model, convolution, by), wanted, rtol=1e-4)


@pytest.mark.parametrize(("net", "convolution"), [(chain, "3"), (stage, "stem"), (stage, "blocks.0.0")])
def test_distances_between_channels_are_the_same(net, convolution):
    """Torch-Pruning takes distances between powers of absolute weights: those of the weights, if they are positive."""
    torch.manual_seed(1)
    model = net()
    for parameter in model.parameters():
        parameter.data.abs_()
    wanted = theirs(model, convolution, tp.importance.FPGMImportance(p=1))
    assert torch.allclose(ours(model, convolution, "fpgm"), wanted, rtol=1e-4)


@pytest.mark.parametrize("convolution", ["0", "2"])
def test_first_order_terms_are_the_same_where_one_kernel_reads_a_channel(convolution):
    """Without biases and norms, the sums over the kernel that makes a channel and the one that reads it are equal."""
    model = chain(norms=False)
    F.cross_entropy(model(IMAGES), LABELS).backward()
    wanted = theirs(model, convolution, tp.importance.GroupTaylorImportance(multivariable=True, normalizer=None))
    model.zero_grad()
    found = ours(model, convolution, "taylor", Batches([(IMAGES, LABELS)], F.cross_entropy))
    assert torch.allclose(found, wanted, rtol=1e-3)


def test_the_same_channels_die():
    torch.manual_seed(1)
    slim, pruned = stage(), stage()
    pruned.load_state_dict(slim.state_dict())
    importance = tp.importance.GroupMagnitudeImportance(p=1)
    tp.pruner.BasePruner(pruned, IMAGES, importance, pruning_ratio=0.5, ignored_layers=[pruned.fc]).step()
    left = tp.utils.count_ops_and_params(pruned, IMAGES)[1]
    share = left / sum(parameter.numel() for parameter in slim.parameters())
    slim = autogate.close(autogate.prepare(slim, IMAGES, params=share), by="l1", allocation="uniform")
    slim = autogate.finalize(slim)
    assert {name: tuple(weight.shape) for name, weight in slim.named_parameters()} == {
        name: tuple(weight.shape) for name, weight in pruned.named_parameters()
    }
    assert torch.equal(slim(IMAGES), pruned(IMAGES))
