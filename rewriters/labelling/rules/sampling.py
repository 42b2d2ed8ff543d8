"""Feature maps sampled at computed positions: on a grid, by deformable convolution, in boxes."""

from __future__ import annotations

from dataclasses import replace

from rewriters.labelling.labels import Labelled
from rewriters.labelling.rules.elementwise import meet
from rewriters.labelling.rules.kernels import convolution
from rewriters.labelling.rules.registry import OpCall, Result, rule

_POSITIONS = "sampled at computed positions"


@rule("aten.grid_sampler_2d", "aten.grid_sampler_3d")
def grid_sampler(call: OpCall) -> Labelled:
    """Sample maps (N, C, ...) at the positions of a grid (N, ..., number of coordinates), which stay together.

    Heads that are folded into N go with their positions (Zhu et al., "Deformable DETR", section 4.1).
    """
    x, grid = call.args[:2]
    positions = Labelled((x.shape[0], *[1] * (x.ndim - 1)), call.mix(grid, range(1, grid.ndim), _POSITIONS))
    maps = Labelled((*x.shape[:2], *[1] * (x.ndim - 2)), call.mix(x, range(2, x.ndim), _POSITIONS))
    return Labelled(call.shape, meet(call, [positions, maps]))


@rule("aten.affine_grid_generator")
def affine_grid(call: OpCall) -> Labelled:
    """A grid of positions (N, ..., number of coordinates) from affine maps (N, number of coordinates, ...)."""
    maps = call.args[0]
    layers = call.mix(maps, range(1, maps.ndim), "the numbers of an affine map")
    return Labelled(call.shape, tuple(layer.reshape(-1, *[1] * (len(call.shape) - 1)) for layer in layers))


@rule("torchvision.deform_conv2d")
def deform_conv2d(call: OpCall) -> Labelled:
    """A convolution that reads where its offsets say: offsets and mask are pinned.

    If groups of channels have their own offsets, the same position of each group dies.
    """
    x, kernel, offset, mask, bias, *steps = call.args
    stride, padding, dilation = steps[:2], steps[2:4], steps[4:6]
    groups, offset_groups, _ = steps[6:]
    for value in (offset, mask):
        call.mix(value, range(value.ndim), _POSITIONS)
    x = Labelled(x.shape, call.mix(x, (2, 3), _POSITIONS), x.source)
    channels = x.layer(1)
    if offset_groups > 1 and channels is not None:
        call.space.merge_along(channels.reshape(len(channels), offset_groups, -1), (1,))
    return convolution(replace(call, args=(x, kernel, bias, stride, padding, dilation, False, (0, 0), groups)))


@rule("torchvision.roi_align", "torchvision.roi_pool")
def cut_out(call: OpCall) -> Result:
    """Crop boxes (K, 5) from maps (N, C, H, W) to (K, C, height, width): channels keep their labels."""
    x, boxes = call.args[:2]
    call.mix(boxes, range(boxes.ndim), _POSITIONS)
    layers = call.mix(x, (0, 2, 3), _POSITIONS)
    return [Labelled(shape, layers) for shape in call.shapes]
