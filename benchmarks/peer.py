"""The same step with Torch-Pruning: its dependency graph, and half of the channels removed by magnitude.

pip install torch-pruning
"""

from __future__ import annotations

import time
from typing import Any

from torch import nn

from autogate.inputs import Inputs
from benchmarks.parts import recorded_flops
from rewriters.outputs import run_eval


def torch_pruning(model: nn.Module, inputs: Inputs) -> dict[str, Any]:
    """Processor time for building its graph and for the pruner's step, FLOPs left, and whether the forward still runs.

    The settings are those of its own timm example: importance by magnitude, half of the channels, and the last linear
    layer ignored.
    """
    import torch_pruning as tp  # the rest of the benchmark doesn't need it

    model.eval()
    dense = recorded_flops(model, inputs)
    start = time.process_time()
    try:
        ignored = [getattr(model, name) for name in ("head", "fc", "classifier") if hasattr(model, name)]
        example = inputs[0][0] if len(inputs[0]) == 1 else inputs[1]
        pruner = tp.pruner.MetaPruner(
            model, example, importance=tp.importance.GroupMagnitudeImportance(), pruning_ratio=0.5,
            ignored_layers=[layer for layer in ignored if isinstance(layer, nn.Linear)],
        )  # fmt: skip
        pruner.step()
        seconds = time.process_time() - start
        run_eval(model, *inputs)
        return {"seconds": seconds, "left": recorded_flops(model, inputs) / dense, "error": ""}
    except Exception as error:
        return {"seconds": time.process_time() - start, "left": None, "error": f"{type(error).__name__}: {error}"[:200]}
