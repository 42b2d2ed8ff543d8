"""What `prepare` refuses before it looks at a model's forward."""

from __future__ import annotations

from typing import Any

import torch
from torch import jit, nn
from torch.ao.quantization import FakeQuantizeBase

from autogate.gating import hooks
from autogate.gating.bank import BANK, GateBank
from autogate.gating.sharding import has_shards
from autogate.wrappers import child_of, is_wrapped
from rewriters import AutogateError
from rewriters.recording import named_modules, named_tensors


def check_preparable(model: Any) -> None:
    """Raise if `prepare` can't take this object: no module, prepared already, wrapped, sharded or scripted."""
    where = type(model).__name__
    if not isinstance(model, nn.Module):
        raise AutogateError("it is not a torch.nn.Module.", where=where, remedy="Pass the model itself.")
    if BANK in model._modules:
        raise AutogateError("it is already prepared.", where=where, remedy="Train it, or finalize it first.")
    _check_parameters(model)
    within = gated_within(model)
    if within:
        raise AutogateError(
            f"its {within!r} is already prepared.",
            where=where,
            remedy="Train that, or call autogate.finalize on it before you prepare what is around it.",
        )
    shared = hooks.gated_elsewhere(model)
    if shared:
        raise AutogateError(
            f"its {shared} has gates already: another module that holds it is prepared.",
            where=where,
            remedy="Prepare the whole model once. Use copy.deepcopy for a model with weights of its own.",
        )
    if hasattr(model, BANK):
        raise AutogateError(f"it has an attribute called {BANK!r}.", where=where, remedy="Rename the attribute.")
    if has_shards(model):
        raise AutogateError(
            "its parameters are sharded.", where=where, remedy="Prepare the model first, then call fully_shard."
        )
    if isinstance(model, jit.ScriptModule):
        raise AutogateError(
            "torch.jit has compiled it.", where=where, remedy="Prepare and finalize the model first, then script it."
        )
    if is_wrapped(model):
        raise AutogateError(
            "it is a wrapper around the model.", where=where, remedy="Prepare the model first, then compile or wrap it."
        )


def _check_parameters(model: nn.Module) -> None:
    """Raise if a tensor has no shape yet, or if no optimizer could ever write to one of the parameters."""
    tensors = named_tensors(model)
    for name, tensor in tensors.items():
        if nn.parameter.is_lazy(tensor):
            raise AutogateError(
                "it belongs to a lazy layer, and has no shape yet.",
                where=name,
                remedy="Run the model on an input first.",
            )
    for name, parameter in tensors.items():
        if not isinstance(parameter, nn.Parameter) or parameter.layout != torch.strided:
            continue
        if parameter.is_inference():
            raise AutogateError(
                "it was made inside of torch.inference_mode, so it can't be trained.",
                where=name,
                remedy="Build the model outside of it, or prepare a copy.deepcopy that was made outside of it.",
            )
        if 0 in (step for step, size in zip(parameter.stride(), parameter.shape, strict=True) if size > 1):
            raise AutogateError(
                "its elements share memory: it is an expanded tensor, which no optimizer can write to.",
                where=name,
                remedy="Store the tensor itself, and expand it in the forward; or store its clone.",
            )


def way_out(model: nn.Module, ignores: bool) -> str:
    """What to do about a model none of whose channels can be removed; `ignores` if the caller has pinned some."""
    if any(isinstance(module, FakeQuantizeBase) for _, module in named_modules(model)):
        return "It is prepared for quantization: slim the model first, as docs/quantization.md says."
    if ignores:
        return "Take layers out of `ignore` and `limits`."
    return (
        "What the first layer reads and the last one returns always stays, so layers have to lie between these. For "
        "ops that need all channels, docs/troubleshooting.md says what to write instead."
    )


def gated_within(model: Any) -> str | None:
    """Path of a prepared submodule, for instance a LightningModule's network; None if there is none."""
    modules = named_modules(model) if isinstance(model, nn.Module) else ()
    return next((path for path, module in modules if isinstance(child_of(module, BANK), GateBank)), None)
