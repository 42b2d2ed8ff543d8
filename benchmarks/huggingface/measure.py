"""Measure one model: prepared on its examples, some of its channels removed, the slim one compared with the gated one.

Compared are logits, boxes and masks, for every call and for copies, and the tokens that both generate.
"""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import torch
from torch import Tensor, nn

import autogate
import rewriters
from benchmarks.huggingface.models import MODELS, Tiny, build
from benchmarks.parts import kill

SHARE = 0.3
"""Of the gates, as many are closed at random."""

_OUTPUTS = ("logits", "pred_boxes", "pred_masks", "iou_scores")


def on_one_thread() -> None:
    """Prepare a process: one thread, and no warnings."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)


def measured(name: str) -> dict[str, Any]:
    """The figures of a model, by their names in a line of JSON."""
    tiny = MODELS[name]
    slim, gated, reach = slim_and_gated(build(name), tiny)
    tokens = same_tokens(slim, gated, tiny) if tiny.generates else None
    return {"reach": reach, "largest_error": largest_error(slim, gated, tiny), "same_tokens": tokens}


def slim_and_gated(model: nn.Module, tiny: Tiny) -> tuple[nn.Module, nn.Module, float]:
    """The slim model, the gated one, and the share of FLOPs that gates reach."""
    first, *others = tiny.calls()[: tiny.examples]
    model = autogate.prepare(model, autogate.Examples(first, *others) if others else first, flops=0.9)
    reach = autogate.summary(model).reach
    kill(model, SHARE)
    autogate.gates(model).fold()
    gated = copy.deepcopy(model)
    return autogate.finalize(model, warn=False), gated, reach


@torch.no_grad()
def largest_error(slim: nn.Module, gated: nn.Module, tiny: Tiny) -> float:
    """The largest relative difference between their outputs, also of copies of the slim one."""
    wanted = [_outputs(gated, call) for call in tiny.calls()]
    copies = [slim, copy.deepcopy(slim)]
    if _can_be_pickled(gated):
        copies.append(pickle.loads(pickle.dumps(slim)))
    return max(
        rewriters.relative_error(_outputs(one, call), outputs)
        for one in copies
        for call, outputs in zip(tiny.calls(), wanted, strict=True)
    )


def _can_be_pickled(model: nn.Module) -> bool:
    """PyTorch refuses parametrized modules, and some of transformers' hooks are local functions."""
    try:
        pickle.dumps(model)
    except (AttributeError, RuntimeError, pickle.PicklingError):
        return False
    return True


def _outputs(model: nn.Module, call: dict[str, Any]) -> list[Tensor]:
    found = model(**call)
    return [found[name] for name in _OUTPUTS if name in found]


@torch.no_grad()
def same_tokens(slim: Any, gated: Any, tiny: Tiny) -> bool:
    """Whether both generate the same tokens from every call's inputs, with the cache and without."""
    options = {"max_new_tokens": 5, "do_sample": False}
    for call in tiny.calls():
        given = {name: value for name, value in call.items() if not name.startswith("decoder_")}
        wanted = gated.generate(**given, use_cache=True, **options)
        if not all(torch.equal(slim.generate(**given, use_cache=cache, **options), wanted) for cache in (True, False)):
            return False
    return True
