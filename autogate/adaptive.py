"""A choice of channels for each image: the network computes more for a hard image than for an easy one.

A small module behind each convolution, and each hidden layer of an MLP, looks at what the layer reads, and says which
of its channels are worth computing for this image (Chen et al., "Self-Adaptive Network Pruning"). The budget is for the
mean over images.

    model = autogate.adaptive.prepare(model, x, flops=0.35, steps=n)    # same object, same outputs
    train(model)                                                        # your own training loop and loss
    model.eval()(images)
    autogate.adaptive.cost(model)                                       # FLOPs of each image, shape (images,)
    print(autogate.adaptive.use(model, loader))                         # which channels they use
    autogate.adaptive.budget(model, flops=0.25, batches=loader)         # another budget, without training
    fast = autogate.adaptive.finalize(model, batches=loader)            # unused channels gone, the rest is skipped
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeVar

from torch import Tensor, nn

from autogate.gating import check_preparable
from autogate.inputs import as_calls, dtype_of_parameters
from autogate.lock import locked
from autogate.naming import Ignored, named_by
from autogate.saliency import SANP, Run, SaliencyBank, Use, check_not_adaptive, install, saliency_of, use_of
from autogate.skipping import Grouping, finalize_adaptive, grouping_of, set_budget
from autogate.slim import AnalysisOptions, PrepareRecord, analyse_channels
from autogate.switching import check_one_width
from autogate.wrappers import unwrap
from rewriters import AutogateError, UndoLog

__all__ = ["SANP", "bank", "budget", "cost", "finalize", "grouping", "prepare", "use"]

M = TypeVar("M", bound=nn.Module)


@locked
def prepare(
    model: M, example_inputs: Any = None, *, flops: float, steps: int = 10_000, warmup: float = 0.1,
    ignore: Ignored = (), method: SANP | None = None,
) -> M:  # fmt: skip
    """Give convolutions and MLPs saliency modules, which choose the channels that are computed for an image.

    The same object is returned, with its class, its paths, and the same outputs in eval mode: all channels are open at
    first. Train it in your own loop and with your own loss; the penalty on costly choices is added as gradients flow
    back. For the first part of the steps (`warmup`) the optimizer only moves the modules, and the model's own weights
    stay as they are. Then all of it trains, and the mean cost falls to the budget. Start with trained weights.

    A convolution with its norm returns `s * b * norm(conv(x))`: the score s and the code b, 0 or 1, are the module's,
    for each image and channel (equation 3). So does a linear layer whose outputs are the hidden units of an MLP.
    Depthwise convolutions, and the second linear layer of a gated MLP, follow the channels that were chosen. Layers
    whose outputs are all needed compute these from the inputs that aren't zero. All else, as grouped convolutions and
    attention, is computed whole for every image.

        >>> import timm, torch, autogate
        >>> model = timm.create_model("resnet18", num_classes=10)
        >>> x = torch.randn(2, 3, 64, 64)
        >>> model = autogate.adaptive.prepare(model, x, flops=0.35, steps=1000)
        >>> model.layer1[0].conv1.saliency.expand.weight.shape
        torch.Size([64, 16])

    Args:
        model: any module with convolutions or MLPs. Prepare it before you build the optimizer, compile or wrap it.
        example_inputs: as for `autogate.prepare`.
        flops: the share of the model's FLOPs that an image may take on average, in (0, 1); modules included.
        steps: number of optimizer steps in the training that follows.
        warmup: the part of them in which only the saliency modules train, in [0, 0.5].
        ignore: layers whose channels are all computed for every image; as for `autogate.prepare`.
        method: settings; `SANP()` if None.

    Raises:
        AutogateError: the model has no layer that could choose, the budget is below what the other layers cost,
            the model can't be analysed, or an argument is wrong. The model is left as it was.
    """
    check_not_adaptive(model)
    check_preparable(model)
    check_one_width(model)
    run = Run(flops, steps, warmup, SANP() if method is None else method)
    ignored = dict.fromkeys(named_by(model, ignore), "the caller asked for it")
    inputs, *others = as_calls(example_inputs, model)
    options = AnalysisOptions(inputs, ignored, others=tuple(others))
    origin = PrepareRecord(options, dtype_of_parameters(model))
    undo_log = UndoLog()
    try:
        install(model, analyse_channels(model, options), run, origin, undo_log)
    except BaseException:
        undo_log.undo()
        raise
    return model


def cost(model: nn.Module) -> Tensor:
    """FLOPs (multiply-adds) of each image of the latest forward, float64, shape (images,).

    They count what inference computes: of each layer, the pairs of channels that it reads and makes for the image; all
    of those that run whole; and the saliency modules. A channel that none of its layers has made isn't read. In train
    mode the noise is left out.

        >>> import timm, torch, autogate
        >>> model = autogate.adaptive.prepare(timm.create_model("resnet18"), torch.randn(2, 3, 64, 64), flops=0.35)
        >>> _ = model.eval()(torch.randn(3, 3, 64, 64))
        >>> autogate.adaptive.cost(model).shape
        torch.Size([3])

    Args:
        model: a model that `prepare` returned, or a compiled or distributed wrapper around it.

    Raises:
        AutogateError: it has no saliency modules, no forward has run, or scores are NaN or infinite.
    """
    return bank(model).cost_of_images().images


@locked
def use(model: nn.Module, batches: Iterable[Any]) -> Use:
    """What images use of a model: how many channels of each layer never, sometimes and always, and their cost.

    Print it for a table (figure 3 of the paper). `use(...).shares` has the share of the FLOPs of each image, in the
    order of the batches, to find the cheapest and the dearest (figure 4).

        >>> import timm, torch, autogate
        >>> model = autogate.adaptive.prepare(timm.create_model("resnet18"), torch.randn(2, 3, 64, 64), flops=0.35)
        >>> found = autogate.adaptive.use(model, [torch.randn(4, 3, 64, 64)])
        >>> found.layers[0]
        LayerUse(path='conv1', never=0, sometimes=0, always=64, mean=1.0)

    Args:
        model: a model that `prepare` returned. It runs in eval mode, and its modes are restored.
        batches: yields images, or tuples whose first item are images.

    Raises:
        AutogateError: it has no saliency modules, there are no batches, or scores are NaN or infinite.
    """
    return use_of(unwrap(model), bank(model), batches)


@locked
def budget(model: nn.Module, *, flops: float, batches: Iterable[Any]) -> float:
    """Give a trained model another budget, without training: shift the threshold that scores must exceed.

    The threshold is calibrated: with it, the images of these batches take `flops` of the FLOPs on average, to a
    thousandth where that can be had. The farther from the budget of the training, the more accuracy is lost.

        >>> import timm, torch, autogate
        >>> model = autogate.adaptive.prepare(timm.create_model("resnet18"), torch.randn(2, 3, 64, 64), flops=0.35)
        >>> for module in autogate.adaptive.bank(model).saliency_modules:
        ...     _ = torch.nn.init.normal_(module.expand.bias)
        >>> share = autogate.adaptive.budget(model, flops=0.5, batches=[torch.randn(4, 3, 64, 64)])
        >>> abs(share - 0.5) < 0.01
        True

    Args:
        model: a model that `prepare` returned. It runs in eval mode, and its modes are restored. Training on moves the
            threshold again, to the budget that was given to `prepare`.
        flops: the share of the FLOPs that an image may take on average, in (0, 1).
        batches: yields images, or tuples whose first item are images; run over several times.

    Returns:
        The share of the FLOPs that these images take on average now.

    Raises:
        AutogateError: it has no saliency modules, the share is out of its range or below what every image takes, there
            are no batches, or scores are NaN or infinite. The threshold is left as it was.
    """
    found = bank(model)
    Run(flops, steps=1)  # raises for a wrong share
    return set_budget(unwrap(model), found, flops, batches)


@locked
def finalize(
    model: M, example_inputs: Any = None, *, batches: Iterable[Any] | None = None, prototypes: int | None = None,
    break_even: float | None = None, warn: bool = True,
) -> M:  # fmt: skip
    """Skip what is off for an image, so that the cost falls on a clock too. Channels that no image uses are removed.

    The same object is returned; outputs stay what they were. In eval mode without gradients, a layer gathers the rows
    of its kernel whose channels are on for an image, and the columns whose input channels aren't zero; a batch norm
    behind it is part of the kernel. Images of a batch that have the same code are run together. A layer runs whole
    where too little is off for this to be faster: from which share on, is measured for each layer on this machine, on
    one image like the example's. In train mode, with gradients, and compiled or exported, it runs as before.

    With `prototypes=k`, the images of a batch run in at most k groups in each stage of the model (a module that takes
    and returns a feature map, such as the layers of one resolution): as they enter it, the means of its channels say to
    which prototype an image belongs. Then it computes no channel that its prototype lacks, at any batch size, so
    outputs change: `grouping(model)` tells by how much.

        >>> import timm, torch, autogate
        >>> model = autogate.adaptive.prepare(timm.create_model("resnet18"), torch.randn(2, 3, 64, 64), flops=0.35)
        >>> images = torch.randn(4, 3, 64, 64)
        >>> wanted = model.eval()(images)
        >>> fast = autogate.adaptive.finalize(model, batches=[images], warn=False)
        >>> with torch.inference_mode():
        ...     torch.allclose(fast(images), wanted, atol=1e-4)
        True

    Args:
        model: a model that `prepare` returned, trained.
        example_inputs: inputs to compare the outputs on, and to time layers on; those given to `prepare` if None.
        batches: yields images, or tuples whose first item are images: those that the model is for, the training set or
            a part of it. A channel that none of them uses is removed for all images, as `autogate.finalize` removes a
            dead one. None removes none. If channels go, build a new optimizer before you train on.
        prototypes: how many codes the images may have in each stage of the model, for fast batches; chosen on the
            batches. None: each image has a code of its own.
        break_even: the share of its work up to which a layer skips, for all layers alike: 1 skips whatever is off, 0
            nothing. None: measured.
        warn: whether to warn if the warm-up isn't over, or if the budget isn't met.

    Raises:
        AutogateError: it has no saliency modules, is finalized already, there are no batches, scores are NaN or
            infinite, a weight isn't finite, or a layer was changed since `prepare`.
        SurgeryError: a module's forward can't be rewritten for the channels that are left.
        VerificationError: the outputs would differ. The model is left as it was.
    """
    return finalize_adaptive(
        unwrap(model), bank(model), example_inputs, batches=batches, prototypes=prototypes, break_even=break_even,
        warn=warn,
    )  # fmt: skip


def grouping(model: nn.Module) -> Grouping | None:
    """How a model that was finalized with prototypes runs images in groups, and how it agrees with the model before.

    Print it for a sentence. None if each image has a code of its own.

        >>> import timm, torch, autogate
        >>> model = autogate.adaptive.prepare(timm.create_model("resnet18"), torch.randn(2, 3, 64, 64), flops=0.35)
        >>> images = torch.randn(8, 3, 64, 64)
        >>> fast = autogate.adaptive.finalize(model, batches=[images], prototypes=2, warn=False)
        >>> autogate.adaptive.grouping(fast).same
        1.0

    Args:
        model: a model that `finalize` returned, or a compiled or distributed wrapper around it.

    Raises:
        AutogateError: it has no saliency modules.
    """
    return grouping_of(bank(model))


def bank(model: nn.Module) -> SaliencyBank:
    """What the saliency modules of a model have in common: progress, lambda, and the modules themselves.

        >>> import timm, torch, autogate
        >>> model = autogate.adaptive.prepare(timm.create_model("resnet18"), torch.randn(2, 3, 64, 64), flops=0.35)
        >>> autogate.adaptive.bank(model)
        SaliencyBank(19 layers, FLOPs 1.000 -> 0.350, step 0 of 10000)

    Args:
        model: a model that `prepare` returned, or a compiled or distributed wrapper around it.

    Raises:
        AutogateError: it has no saliency modules.
    """
    found = saliency_of(unwrap(model))
    if found is None:
        raise AutogateError(
            "it has no saliency modules.",
            where=type(unwrap(model)).__name__,
            remedy="Call autogate.adaptive.prepare(model, x, flops=0.5) first.",
        )
    return found
